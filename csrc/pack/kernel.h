// PackedKernel: a Triton kernel compiled ahead of time. It finds the variant that was compiled for
// the arguments of a call, and launches it.
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

// How a parameter enters the key of a variant. These are Triton's specialisation rules.
enum Specialize : int { kConstexpr = 1, kValue = 2, kAlignment = 4 };

// The fields of a tensor descriptor that the kernel was compiled for (Triton's tensordesc_meta).
struct Descriptor {
  int swizzle, element_bytes, element_type;
  std::vector<uint32_t> block;
};

struct Variant {
  std::string symbol;
  unsigned threads, shared;
  std::vector<size_t> sizes;  // Size of each parameter in bytes, the two hidden ones last.
  std::vector<Descriptor> descriptors;
  py::object image;               // A Python function that returns the bytes of the cubin.
  std::vector<Handle> functions;  // The loaded function, for each device.
};

class PackedKernel {
 public:
  // dtypes maps torch dtypes to their names in keys. options names the launch options, which are
  // part of the key unless they are None.
  PackedKernel(std::vector<std::pair<std::string, int>> parameters,
               std::vector<std::string> options, py::dict dtypes);

  void add(const std::string& key, Variant variant);

  // Return the key of a launch, or None if an argument has a type that no key can express.
  py::object key(const py::tuple& args, const py::dict& kwargs) const;

  // Launch the variant for these arguments; return false if there is none. Throws Unusable if it
  // cannot be loaded, std::invalid_argument for a tensor that is not on the GPU, and
  // std::runtime_error if the driver reports an error.
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
