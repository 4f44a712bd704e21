// A deliberate out-of-bounds read that `make sanitize` must report. Built only with LLMOS_SANITIZE.
#include <torch/csrc/stable/library.h>

#include "../tensor_view.h"

namespace llmos {
namespace {

// Return the element after the last one of x, which is float32.
double overread(const Tensor& x) {
  return static_cast<const float*>(x.const_data_ptr())[x.numel()];
}

}  // namespace

STABLE_TORCH_LIBRARY(llmos_testing, m) { m.def("overread(Tensor x) -> float"); }
STABLE_TORCH_LIBRARY_IMPL(llmos_testing, CPU, m) { m.impl("overread", TORCH_BOX(&overread)); }

}  // namespace llmos
