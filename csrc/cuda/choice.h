// Which calls of an op CUDA C++ computes: those of few rows, where the launch is the work. The
// others go to Triton's launcher, the op `<name>_triton`, through the dispatcher.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <array>
#include <atomic>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "launch.h"

namespace llmos {

constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();
// What few rows are where no GPU has measured it.
constexpr int64_t kFewRows = 256;

// The choice for one op; its first argument is a tensor.
class Choice {
 public:
  // name: of the op.
  // most_rows: those that are computed here, unless set_most_rows says otherwise.
  // width_at: the argument with the number of elements of a row; -1 for the last size of the first
  //     argument, 0 for rows of one element.
  // widest: the widest rows that are computed here.
  // fits: what else must be true of the arguments, whatever was measured; or null.
  Choice(const char* name, int64_t most_rows, int width_at, int64_t widest = kNoLimit,
         bool (*fits)(const StableIValue*) = nullptr)
      : name_(name),
        triton_(std::string(LLMOS_NAMESPACE "::") + name + "_triton"),
        most_rows_(most_rows),
        width_at_(width_at),
        widest_(widest),
        fits_(fits) {}

  // Let calls of an op, or of "*", be computed here up to a number of rows on an architecture, such
  // as 90, or on every one, 0, in place of what was said of single ones before. This is for rows of
  // up to `width` elements, as far as nothing was said of narrower ones; what was said of the
  // widest counts for all that are wider. Return false if there is no such op, or its table is
  // full.
  static bool set_most_rows(const char* name, int arch, int64_t width, int64_t rows) {
    bool is_set = false;
    for (Choice* choice = first_; choice; choice = choice->next_) {
      if (std::strcmp(name, "*") && std::strcmp(choice->name_, name)) continue;
      for (Rows& known : choice->measured_)
        if (arch == kEvery || known.arch == kEvery) known.arch = kNone;
      for (Rows& known : choice->measured_) {
        if (known.arch != kNone && (known.arch != arch || known.width != width)) continue;
        known.rows = rows;
        known.width = width;
        known.arch = arch;
        is_set = true;
        break;
      }
    }
    return is_set;
  }

  const char* name() const { return name_; }

  void add_to_list() {
    next_ = first_;
    first_ = this;
  }

  // Run the op, by `here` or by Triton. The stack has the arguments, and gets the results.
  void run(void (*here)(StableIValue*, uint64_t, uint64_t), StableIValue* stack, uint64_t arguments,
           uint64_t results) const {
    if (is_here(stack)) return here(stack, arguments, results);
    const char* triton = triton_.c_str();
    check_call(torch_call_dispatcher(triton, "", stack, TORCH_ABI_VERSION), triton);
  }

 private:
  bool is_here(const StableIValue* stack) const {
    const auto tensor = torch::stable::detail::to<AtenTensorHandle>(stack[0]);
    int64_t dims = 0, elements = 0, width = 1;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &dims));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(tensor, &elements));
    if (width_at_ > 0)
      width = torch::stable::detail::to<int64_t>(stack[width_at_]);
    else if (width_at_ < 0 && dims > 0)
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_size(tensor, dims - 1, &width));
    const int64_t rows = elements / std::max<int64_t>(width, 1);
    return rows <= most_rows(arch_of(tensor), width) && width <= widest_ &&
           (!fits_ || fits_(stack));
  }

  // Return how many rows of a width are computed here; none on a GPU that this library was not
  // compiled for.
  int64_t most_rows(int arch, int64_t width) const {
    if (arch == kNone) return -1;
    // The narrowest of those that were measured as wide or wider, else the widest.
    const auto order = [&](const Rows& known) -> std::pair<bool, int64_t> {
      if (known.width < width) return {true, -known.width};
      return {false, known.width};
    };
    const Rows* best = nullptr;
    for (const Rows& known : measured_)
      if ((known.arch == arch || known.arch == kEvery) && (!best || order(known) < order(*best)))
        best = &known;
    return best ? best->rows.load() : most_rows_;
  }

  static constexpr int kNone = -1, kEvery = 0;
  struct Rows {
    std::atomic<int> arch{kNone};
    std::atomic<int64_t> width{0}, rows{0};
  };

  const char* name_;
  std::string triton_;  // The op of Triton's launcher.
  int64_t most_rows_;
  std::array<Rows, 32> measured_;
  int width_at_;
  int64_t widest_;
  bool (*fits_)(const StableIValue*);
  Choice* next_ = nullptr;
  static inline Choice* first_ = nullptr;
};

// Register kFunction for the op of kChoice.
template <Choice& kChoice, auto kFunction>
void own(torch::stable::detail::StableLibrary& library) {
  kChoice.add_to_list();
  library.impl(kChoice.name(), [](StableIValue* stack, uint64_t arguments, uint64_t results) {
    kChoice.run(torch::stable::detail::boxer<std::remove_pointer_t<decltype(kFunction)>,
                                             kFunction>::boxed_fn,
                stack, arguments, results);
  });
}

}  // namespace llmos
