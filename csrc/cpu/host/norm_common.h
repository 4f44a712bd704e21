// Helpers for the host code of ops with a normalization: its parameters, and their gradients.
#pragma once

#include <algorithm>

#include "../layer_norm.h"
#include "common.h"

namespace llmos {

// Below this many elements, starting threads costs more time than it saves.
constexpr int64_t kNormGrain = 32768;

// Normalise `rows` rows of at least one element.
template <class T>
void run_norm(const NormForwardArgs<T>& args, int64_t rows);

// A weight or bias as d contiguous floats; makes a copy where the dtype is another.
struct NormParameter {
  Optional tensor;
  Floats copy;
  const float* data = nullptr;

  NormParameter(const Optional& t, int64_t d) {
    if (!t) return;
    STD_TORCH_CHECK(t->numel() == d, "layer_norm: expected a weight or bias of ", d,
                    " elements, got ", t->numel());
    if (!t->is_contiguous()) tensor = torch::stable::contiguous(*t);
    const Tensor& dense = tensor ? *tensor : *t;
    if (t->scalar_type() == ScalarType::Float) {
      data = llmos::data<float>(dense);
      return;
    }
    copy = floats(d);
    for_dtype(t->scalar_type(), [&](auto w) {
      using W = decltype(w);
      to_float<W>.best()(llmos::data<W>(dense), copy.get(), d);
    });
    data = copy.get();
  }
};

// Run body(begin, end, dweight, dbias) over chunks of the rows, and add the chunks' gradients, in
// order, into dweight and dbias ([d], or [0] where not wanted). Each call adds the gradients of its
// rows to two float buffers [d], which are null if neither gradient is wanted.
template <class Body>
void sum_weight_gradients(int64_t rows, int64_t d, const Tensor& dweight, const Tensor& dbias,
                          Body body) {
  const bool weight_grad = dweight.numel(), bias_grad = dbias.numel();
  const bool partials = weight_grad || bias_grad;
  // The chunk size depends on the shape alone, so that the result does not depend on the number of
  // threads.
  const int64_t chunk = std::max<int64_t>(32, (rows + 63) / 64),
                chunks = (rows + chunk - 1) / chunk;
  // [chunk][weight, bias][d]
  Tensor partial = output(dweight, {partials ? chunks * 2 * d : 0}, ScalarType::Float);
  float* sums = partials ? mutable_data<float>(partial) : nullptr;
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* sum = sums ? sums + i * 2 * d : nullptr;
      if (sum) std::fill(sum, sum + 2 * d, 0.0f);
      body(i * chunk, std::min(rows, (i + 1) * chunk), sum, sum ? sum + d : nullptr);
    }
  };
  if (rows * d <= kNormGrain) {
    run(0, chunks);
  } else {
    torch::stable::parallel_for(0, chunks, 1 + kNormGrain / 2 / (chunk * d), run);
  }
  if (!partials) return;
  for_dtype(dweight.scalar_type(), [&](auto w) {
    using W = decltype(w);
    const auto add = sum_partials<W>.best();
    torch::stable::parallel_for(
        0, d, 1 + kNormGrain / (chunks + 1), [&](int64_t begin, int64_t end) {
          if (weight_grad) add(sums, chunks, 2 * d, mutable_data<W>(dweight), begin, end);
          if (bias_grad) add(sums + d, chunks, 2 * d, mutable_data<W>(dbias), begin, end);
        });
  });
}

}  // namespace llmos
