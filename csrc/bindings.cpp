// llmos_kernels._C: what was built, what of it this process uses, and the launcher of Triton
// kernels that were compiled ahead of time. No tensor code.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/isa.h"
#include "pack/kernel.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and the CPU level of llmos_kernels.";
  m.def(
      "cpu_level", [] { return std::string(llmos::cpu_level_names[llmos::cpu_level()]); },
      "The CPU level in use; LLMOS_CPU_LEVEL lowers it. Raises ValueError for an unknown one.");
  m.def(
      "cpu_levels",
      [] {
        const auto* names = llmos::cpu_level_names;
        return std::vector<std::string>(names, names + llmos::cpu_level_supported() + 1);
      },
      "The CPU levels that this machine can run, lowest first.");
  m.def("is_intel", &llmos::is_intel, "Whether the CPU is one of Intel's.");
  m.def("packs_int8", &llmos::multiplies_quads, "Whether int8 products read a packed weight.");

  py::register_exception<llmos::pack::Unusable>(m, "Unusable", PyExc_RuntimeError);
  using llmos::pack::Descriptor, llmos::pack::Kernel, llmos::pack::Variant;
  using Map = std::tuple<int, int, int, std::vector<uint32_t>>;
  py::class_<Kernel>(m, "Kernel",
                     "The variants of one Triton kernel that were compiled ahead of time.")
      .def(py::init<std::vector<std::pair<std::string, int>>, std::vector<std::string>, py::dict>(),
           py::arg("parameters"), py::arg("options"), py::arg("dtypes"))
      .def(
          "add",
          [](Kernel& kernel, const std::string& key, std::string symbol, unsigned threads,
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
      .def("key", &Kernel::key, py::arg("args"), py::arg("kwargs"),
           "The key of a launch, or None for arguments that no variant can have.")
      .def("launch", &Kernel::launch, py::arg("device"), py::arg("stream"), py::arg("grid"),
           py::arg("args"), py::arg("kwargs"),
           "Launch the variant for these arguments; False where there is none.");
  m.attr("build") = py::dict(py::arg("compiler") = LLMOS_COMPILER, py::arg("torch") = LLMOS_TORCH,
                             py::arg("cuda_archs") = LLMOS_CUDA_ARCHS,
                             py::arg("sanitize") = bool(LLMOS_SANITIZE));
}
