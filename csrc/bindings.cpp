// The Python module llmos_kernels._C: build information, the ISA in use, and the launcher of Triton
// kernels that were compiled ahead of time. It has no tensor code.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/isa.h"
#include "pack/kernel.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Build information, the CPU level (ISA) in use, and the launcher of ahead-of-time kernels.";
  m.def(
      "cpu_level", [] { return std::string(llmos::isa_names[llmos::isa_in_use()]); },
      "Return the CPU level (ISA) in use; LLMOS_CPU_LEVEL lowers it. Raises ValueError if that "
      "names an unknown one.");
  m.def(
      "cpu_levels",
      [] {
        const auto* names = llmos::isa_names;
        return std::vector<std::string>(names, names + llmos::best_isa() + 1);
      },
      "Return the CPU levels (ISAs) that this machine can run, lowest first.");
  m.def("is_intel", &llmos::is_intel, "Return True if the CPU is made by Intel.");

  py::register_exception<llmos::pack::Unusable>(m, "Unusable", PyExc_RuntimeError);
  using llmos::pack::Descriptor, llmos::pack::PackedKernel, llmos::pack::Variant;
  using Map = std::tuple<int, int, int, std::vector<uint32_t>>;
  py::class_<PackedKernel>(m, "PackedKernel",
                           "The variants of one Triton kernel that were compiled ahead of time.")
      .def(py::init<std::vector<std::pair<std::string, int>>, std::vector<std::string>, py::dict>(),
           py::arg("parameters"), py::arg("options"), py::arg("dtypes"))
      .def(
          "add",
          [](PackedKernel& kernel, const std::string& key, std::string symbol, unsigned threads,
             unsigned shared, std::vector<size_t> sizes, const std::vector<Map>& maps,
             py::object image) {
            std::vector<Descriptor> descriptors;
            for (const auto& [swizzle, bytes, type, block] : maps)
              descriptors.push_back({swizzle, bytes, type, block});
            kernel.add(key, Variant{std::move(symbol),
                                    threads,
                                    shared,
                                    std::move(sizes),
                                    std::move(descriptors),
                                    std::move(image),
                                    {}});
          },
          py::arg("key"), py::arg("symbol"), py::arg("threads"), py::arg("shared"),
          py::arg("sizes"), py::arg("maps"), py::arg("image"))
      .def("key", &PackedKernel::key, py::arg("args"), py::arg("kwargs"),
           "Return the key of a launch, or None for arguments that no variant accepts.")
      .def("launch", &PackedKernel::launch, py::arg("device"), py::arg("stream"), py::arg("grid"),
           py::arg("args"), py::arg("kwargs"),
           "Launch the variant for these arguments; return False if there is none.");
  m.attr("build") = py::dict(py::arg("compiler") = LLMOS_COMPILER, py::arg("torch") = LLMOS_TORCH,
                             py::arg("cuda_archs") = LLMOS_CUDA_ARCHS,
                             py::arg("sanitize") = bool(LLMOS_SANITIZE));
}
