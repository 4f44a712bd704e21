// A Triton kernel compiled ahead of time: finds the variant for some arguments, and launches it.
#pragma once

#include <pybind11/pybind11.h>

#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "driver.h"

namespace llmos::pack {

namespace py = pybind11;

// How a parameter shapes the key: Triton's own rules.
enum Specialize : int { kConstexpr = 1, kValue = 2, kAlignment = 4 };

// What the kernel needs to know of a tensor descriptor: of the compiled kernel's tensordesc_meta.
struct Descriptor {
  int swizzle, element_bytes, element_type;
  std::vector<uint32_t> block;
};

struct Variant {
  std::string symbol;
  unsigned threads, shared;
  std::vector<size_t> sizes;  // Bytes of each parameter, the two hidden ones last.
  std::vector<Descriptor> descriptors;
  py::object image;               // Called for the bytes of the cubin.
  std::vector<Handle> functions;  // By device.
};

class Kernel {
 public:
  // dtypes: of torch, to the names in keys. options: launch options, in the key if not None.
  Kernel(std::vector<std::pair<std::string, int>> parameters, std::vector<std::string> options,
         py::dict dtypes);

  void add(const std::string& key, Variant variant);

  // The key of a launch with these arguments; None for an argument of a kind that no key has.
  py::object key(const py::tuple& args, const py::dict& kwargs) const;

  // Whether there was a variant to launch. Throws Unusable for one that cannot be loaded,
  // std::invalid_argument for a tensor elsewhere, std::runtime_error for what the driver refuses.
  bool launch(int device, uint64_t stream, const py::tuple& grid, const py::tuple& args,
              const py::dict& kwargs);

 private:
  struct Arguments;
  bool read(const py::tuple& args, const py::dict& kwargs, Arguments& to) const;
  Handle function(Variant& variant, int device);

  struct Parameter {
    py::str name;
    int specialize;
  };
  std::vector<Parameter> parameters_;
  std::vector<Parameter> options_;
  py::dict dtypes_;
  std::unordered_map<std::string, Variant> variants_;
  std::mutex loading_;
};

}  // namespace llmos::pack
