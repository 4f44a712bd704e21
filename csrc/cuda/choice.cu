// Sets, from outside, what CUDA C++ computes and what Triton's launchers do.
#include "choice.h"

extern "C" {

// Choice::set_most_rows; return 0 if that is not possible.
[[gnu::visibility("default")]] int llmos_cuda_rows(const char* op, int arch, int64_t width,
                                                   int64_t rows) {
  return llmos::Choice::set_most_rows(op, arch, width, rows);
}
}
