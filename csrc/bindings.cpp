// llmos_kernels._C: what was built, and what of it this process uses. No tensor code.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/level.h"

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
  m.def("packs_int8", &llmos::multiplies_quads, "Whether int8 products read a packed weight.");
  m.attr("build") = py::dict(py::arg("compiler") = LLMOS_COMPILER, py::arg("torch") = LLMOS_TORCH,
                             py::arg("cuda_archs") = LLMOS_CUDA_ARCHS,
                             py::arg("sanitize") = bool(LLMOS_SANITIZE));
}
