// The attention forward op: tasks over blocks of query rows, or over keys where query rows are few.
#include "../attention.h"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "attention_inputs.h"

namespace llmos {
namespace {

// With few query rows and many keys (decoding), the keys are split among tasks. Only the number of
// keys decides, so that the result does not depend on the batch size or the threads.
constexpr int64_t kSplitRows = 16, kSplitKeys = 1024;

struct Splits {
  std::vector<AttentionTask> tasks;
  Floats partial;
  // A query row whose keys are split: the offset of its first partial result, and where the row is
  // in the tensors.
  struct Row {
    int64_t at, splits, sequence, head, index;
  };
  std::vector<Row> rows;
};

Splits split(const AttentionInputs& in, int64_t block) {
  Splits result;
  const int64_t group = in.heads / in.kv_heads, floats_per_row = in.v_dim + 2;
  std::vector<std::pair<size_t, int64_t>> split_tasks;
  int64_t size = 0;
  for (size_t s = 0; s < in.sequences.size(); ++s) {
    const Sequence& seq = in.sequences[s];
    const int64_t rows = group * seq.q_len, blocks = (rows + block - 1) / block;
    const bool splits = rows <= std::min(kSplitRows, block) && seq.k_len > kSplitKeys;
    for (int64_t h = 0; h < in.kv_heads; ++h) {
      if (!splits) {
        for (int64_t b = 0; b < blocks; ++b)
          result.tasks.push_back({int64_t(s), h, alternating(b, blocks), 0, seq.k_len, nullptr});
        continue;
      }
      const int64_t count = (seq.k_len + kSplitKeys - 1) / kSplitKeys;
      for (int64_t r = 0; r < rows; ++r)
        result.rows.push_back({size + r * floats_per_row, count, int64_t(s),
                               h * group + r / seq.q_len, seq.q_begin + r % seq.q_len});
      for (int64_t i = 0; i < count; ++i, size += rows * floats_per_row) {
        split_tasks.push_back({result.tasks.size(), size});
        result.tasks.push_back(
            {int64_t(s), h, 0, i * kSplitKeys, std::min((i + 1) * kSplitKeys, seq.k_len), nullptr});
      }
    }
  }
  result.partial = floats(size);
  for (auto [task, at] : split_tasks) result.tasks[task].partial = result.partial.get() + at;
  return result;
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const Optional& mask, const Optional& padding,
                                   const Optional& cu_q, const Optional& cu_k,
                                   const Optional& sinks, double scale, int64_t causal,
                                   double dropout_p, double softcap, const Optional& seed) {
  const AttentionInputs in(query, key, value, mask, padding, cu_q, cu_k, sinks, scale, causal,
                           dropout_p, softcap, seed);
  Tensor out = output(query, {in.batch, in.q_total, in.heads, in.v_dim}, query.scalar_type());
  Tensor stats = output(query, {2, in.batch, in.heads, in.q_total}, ScalarType::Float);
  if (out.numel() == 0) return {out, stats};
  float* m = mutable_data<float>(stats);
  float* inverse = m + in.batch * in.heads * in.q_total;

  for_dtype(query.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const auto& kernel = *task_kernel<AttentionForwardArgs<T>>.best();
    const AttentionForwardArgs<T> args{in.of<T>(m, inverse), AttentionInputs::output_heads<T>(out)};
    const Splits work = split(in, kernel.block);
    const double size = double(in.q_total) * in.k_longest * in.heads * in.batch;
    run_in_parallel(kernel, args, work.tasks, size * (in.dim + in.v_dim));

    const auto combine = combine_splits<T>.best();
    const int64_t group = in.heads / in.kv_heads, floats_per_row = in.v_dim + 2;
    for (const Splits::Row& row : work.rows) {
      const Sequence& s = in.sequences[row.sequence];
      const int64_t at = args.common.stats_at(s.batch, row.head, row.index);
      const float sink =
          in.sinks.empty() ? -std::numeric_limits<float>::infinity() : in.sinks[row.head];
      combine(args.common, work.partial.get() + row.at, row.splits,
              group * s.q_len * floats_per_row, sink, args.out.at(s.batch, row.head, row.index),
              m + at, inverse + at);
    }
  });
  return {out, stats};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmos, CPU, m) { m.impl("attention_forward", TORCH_BOX(&forward)); }

}  // namespace llmos
