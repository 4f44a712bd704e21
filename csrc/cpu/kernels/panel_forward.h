// Products of whole matrices with what follows them.
#pragma once

#include "epilogue.h"
#include "panels.h"

namespace llmos {
namespace {

// out of Args, which has the members of LinearForward, its operands of T. Sums{args, first row,
// first column, sums, step} reads a block's sums for finish.
template <class T, class Args, class Sums>
struct PanelForward {
  static constexpr int64_t kBlock = kStrip;
  using S = typename Panels<T>::S;
  const Args& a;
  Panels<T> panels;
  S* turned;  // [row of input][row of the weight]: sums of a block.

  PanelForward(const Args& a, Scratch scratch)
      : a(a), panels(scratch), turned(scratch.take<S>(kStrip * kBlockRows)) {}
  static int64_t scratch(const Args&) {
    return Panels<T>::scratch() + Scratch::size<S>(kStrip * kBlockRows);
  }

  void run(const ProductTask& task) {
    with_activation(a.epilogue.activation, [&](auto activation) {
      a.turned ? run_turned<activation>(task) : run<activation>(task);
    });
  }

  template <Activation kActivation>
  void run(const ProductTask& task) {
    const Matrix<T> right{a.weight.data, a.weight.column, a.weight.row};
    panels.multiply(a.input, right, a.inner, task,
                    [&](int64_t begin, int64_t rows, int64_t first, int64_t columns, const S* c) {
                      finish<kActivation>(a, begin, rows, first, columns,
                                          Sums{a, begin, first, c, kStrip});
                    });
  }

  // The weight is the left operand, the rows of input are columns of panels.
  template <Activation kActivation>
  void run_turned(const ProductTask& task) {
    const Matrix<T> right{a.input.data, a.input.column, a.input.row};
    panels.multiply(a.weight, right, a.inner, task,
                    [&](int64_t begin, int64_t count, int64_t first, int64_t rows, const S* c) {
                      turn_sums(c, kStrip, count, rows, turned, kBlockRows);
                      finish<kActivation>(a, first, rows, begin, count,
                                          Sums{a, first, begin, turned, kBlockRows});
                    });
  }
};

}  // namespace
}  // namespace llmos
