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

template <class T>
Splits split(const AttentionCommonArgs<T>& a, const std::vector<Sequence>& sequences,
             int64_t block) {
  Splits result;
  const int64_t group = a.group(), floats_per_row = a.v_dim + 2;
  std::vector<std::pair<size_t, int64_t>> split_tasks;
  int64_t size = 0;
  for (size_t s = 0; s < sequences.size(); ++s) {
    const Sequence& seq = sequences[s];
    const int64_t rows = group * seq.q_len, blocks = (rows + block - 1) / block;
    const bool splits = rows <= std::min(kSplitRows, block) && seq.k_len > kSplitKeys;
    for (int64_t h = 0; h < a.kv_heads; ++h) {
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

}  // namespace

template <class T>
void run_attention(const AttentionForwardArgs<T>& args, const std::vector<Sequence>& sequences) {
  const AttentionCommonArgs<T>& a = args.common;
  const auto& kernel = *task_kernel<AttentionForwardArgs<T>>.best();
  const Splits work = split(a, sequences, kernel.block);
  double pairs = 0;
  for (const Sequence& s : sequences) pairs += double(s.q_len) * s.k_len * a.heads;
  run_in_parallel(kernel, args, work.tasks, pairs * (a.dim + a.v_dim));

  const auto combine = combine_splits<T>.best();
  const int64_t floats_per_row = a.v_dim + 2;
  for (const Splits::Row& row : work.rows) {
    const Sequence& s = sequences[row.sequence];
    const int64_t at = a.stats_at(s.batch, row.head, row.index);
    const float sink = a.sinks ? a.sinks[row.head] : -std::numeric_limits<float>::infinity();
    combine(a, work.partial.get() + row.at, row.splits, a.group() * s.q_len * floats_per_row, sink,
            args.out.at(s.batch, row.head, row.index), a.m + at, a.inverse + at);
  }
}
template void run_attention(const AttentionForwardArgs<float>&, const std::vector<Sequence>&);
template void run_attention(const AttentionForwardArgs<bf16>&, const std::vector<Sequence>&);
template void run_attention(const AttentionForwardArgs<f16>&, const std::vector<Sequence>&);

namespace {

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
    run_attention<T>({in.of<T>(m, inverse), AttentionInputs::output_heads<T>(out)}, in.sequences);
  });
  return {out, stats};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmos, CPU, m) { m.impl("attention_forward", TORCH_BOX(&forward)); }

}  // namespace llmos
