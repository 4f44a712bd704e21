// Sets, from outside, what CUDA C++ computes and what Triton's launchers do.
#include "choice.h"

extern "C" {

// Let calls of an op with up to `rows` rows be computed here, on GPUs of an architecture, or with 0
// on all. Return 0 if that is not possible.
[[gnu::visibility("default")]] int llmos_cuda_rows(const char* op, int arch, int64_t rows) {
  return llmos::Choice::set_most_rows(op, arch, rows);
}
}
