// The attention ops after the forward: gradients, and the attention weights as a tensor.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../attention.h"
#include "../layer_norm.h"
#include "attention_inputs.h"

namespace llmos {
namespace {

std::vector<AttentionTask> blocks(int64_t batch, int64_t heads, int64_t rows, int64_t block) {
  std::vector<AttentionTask> tasks;
  const int64_t n = (rows + block - 1) / block;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < n; ++i) tasks.push_back({b, h, alternating(i, n), 0, 0, nullptr});
  return tasks;
}

Tensor weights(const Tensor& query, const Tensor& key, const Optional& mask,
               const Optional& padding, const Tensor& stats_, double scale, int64_t causal,
               double dropout_p, double softcap, const Optional& seed, bool mean) {
  const AttentionInputs in(query, key, key, mask, padding, {}, {}, {}, scale, causal, dropout_p,
                           softcap, seed);
  const ScalarType dtype = query.scalar_type();
  Tensor out = mean ? output(query, {in.batch, in.q_total, in.k_total}, dtype)
                    : output(query, {in.batch, in.heads, in.q_total, in.k_total}, dtype);
  if (out.numel() == 0) return out;
  const Tensor stats = llmos::contiguous(stats_);
  // The kernels only read the statistics.
  float* m = const_cast<float*>(data<float>(stats));
  for_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const auto& kernel = *task_kernel<AttentionWeightsArgs<T>>.best();
    const AttentionWeightsArgs<T> args{in.of<T>(m, m + in.batch * in.heads * in.q_total),
                                       mutable_data<T>(out), mean};
    const double work = double(in.q_total) * in.k_total * in.heads * in.batch * in.dim;
    run_in_parallel(kernel, args, blocks(in.batch, mean ? 1 : in.heads, in.q_total, kernel.block),
                    work);
  });
  return out;
}

// Compute the gradients of query, key and value, and in float32 that of attn_mask, if `dmask` has
// data. Heads and batch elements whose gradients add up in dmask are one task. Where such tasks
// would keep threads idle for longer than two more products take, dmask is computed apart, by
// blocks of query rows. So it is where query heads share key heads, whatever the threads: the
// blocks are others then, and so would be the bits.
template <class T>
void run_backward(const AttentionInputs& in, AttentionBackwardArgs<T> args,
                  const MaskGradient& dmask) {
  const int64_t sequences = in.sequences.size(), threads = torch::stable::get_num_threads();
  const int64_t sums = dmask.batch * (dmask.heads == 1 ? 1 : in.kv_heads);
  const int64_t turns = (sums + threads - 1) / threads;
  const bool together = dmask.data && in.heads == in.kv_heads && 5 * turns * threads <= 7 * sums;
  if (together) args.dmask = dmask;
  const double pairs = double(in.q_total) * in.k_longest * in.heads * in.batch;
  run_in_parallel(*task_kernel<AttentionBackwardArgs<T>>.best(), args,
                  together ? blocks(dmask.batch, sums / dmask.batch, 1, 1)
                           : blocks(sequences, in.kv_heads, 1, 1),
                  pairs * (3 * in.dim + 2 * in.v_dim));
  if (!dmask.data || together) return;
  args.dmask = dmask;
  const auto& kernel = *task_kernel<AttentionMaskBackwardArgs<T>>.best();
  run_in_parallel(kernel, AttentionMaskBackwardArgs<T>{args},
                  blocks(dmask.batch, dmask.heads, dmask.q_len, kernel.block),
                  pairs * (in.dim + in.v_dim));
}

// Write the gradient of sinks: for each head the sum of `gradients` [batch][head][query].
void sum_sink_gradients(const AttentionInputs& in, const float* gradients, const Tensor& dsinks) {
  std::vector<float> sums(in.heads);
  for (int64_t h = 0; h < in.heads; ++h) {
    double sum = 0;
    for (int64_t b = 0; b < in.batch; ++b)
      for (int64_t i = 0; i < in.q_total; ++i)
        sum += gradients[(b * in.heads + h) * in.q_total + i];
    sums[h] = float(sum);
  }
  for_dtype(dsinks.scalar_type(), [&](auto w) {
    using W = decltype(w);
    sum_partials<W>.best()(sums.data(), 1, 0, mutable_data<W>(dsinks), 0, in.heads);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dout_, const Tensor& query, const Tensor& key, const Tensor& value,
    const Optional& mask, const Optional& padding, const Optional& cu_q, const Optional& cu_k,
    const Optional& sinks, const Tensor& out_, const Tensor& stats_, double scale, int64_t causal,
    double dropout_p, double softcap, const Optional& seed, bool mask_grad) {
  const AttentionInputs in(query, key, value, mask, padding, cu_q, cu_k, sinks, scale, causal,
                           dropout_p, softcap, seed);
  const ScalarType dtype = query.scalar_type();
  Tensor dquery = output(query, {in.batch, in.q_total, in.heads, in.dim}, dtype);
  Tensor dkey = output(query, {in.batch, in.k_total, in.kv_heads, in.dim}, dtype);
  Tensor dvalue = output(query, {in.batch, in.k_total, in.kv_heads, in.v_dim}, dtype);
  const ScalarType mask_dtype = mask_grad ? mask->scalar_type() : dtype;
  Tensor dmask = mask_grad ? output(query, mask->sizes(), mask_dtype) : output(query, {0}, dtype);
  const bool narrow = mask_grad && mask_dtype != ScalarType::Float;
  const Tensor sums = narrow ? output(query, mask->sizes(), ScalarType::Float) : dmask;
  Tensor dsinks =
      sinks ? output(query, {in.heads}, sinks->scalar_type()) : output(query, {0}, dtype);
  const Floats sink_gradients = sinks ? floats(in.batch * in.heads * in.q_total) : nullptr;
  const Tensor dout = AttentionInputs::with_contiguous_rows(dout_), out = llmos::contiguous(out_);
  const Tensor stats = llmos::contiguous(stats_);
  float* m = const_cast<float*>(data<float>(stats));

  for_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const auto out_heads = AttentionInputs::output_heads<T>(out);
    const AttentionBackwardArgs<T> args{
        .common = in.of<T>(m, m + in.batch * in.heads * in.q_total),
        .dout = AttentionInputs::heads_of<T>(dout),
        .out = {out_heads.data, out_heads.batch_stride, out_heads.head_stride,
                out_heads.row_stride},
        .dquery = AttentionInputs::output_heads<T>(dquery),
        .dkey = AttentionInputs::output_heads<T>(dkey),
        .dvalue = AttentionInputs::output_heads<T>(dvalue),
        .sink_gradients = sink_gradients.get(),
    };
    MaskGradient mask_sums;
    if (mask_grad && dmask.numel() > 0) {
      mask_sums = {mutable_data<float>(sums),
                   sums.size(0),
                   sums.size(1),
                   sums.size(2),
                   sums.size(3),
                   in.batch};
    }
    run_backward(in, args, mask_sums);
    if (sinks) sum_sink_gradients(in, sink_gradients.get(), dsinks);
    if (!mask_sums.data || mask_dtype == ScalarType::Float) return;
    for_dtype(mask_dtype, [&](auto w) {
      using W = decltype(w);
      sum_partials<W>.best()(data<float>(sums), 1, 0, mutable_data<W>(dmask), 0, dmask.numel());
    });
  });
  return {dquery, dkey, dvalue, dmask, dsinks};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmos, CPU, m) {
  m.impl("attention_weights", TORCH_BOX(&weights));
  m.impl("attention_backward", TORCH_BOX(&backward));
}

}  // namespace llmos
