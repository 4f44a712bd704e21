// The gradient of attn_mask alone.
#include "attention_gradients.h"

namespace llmos {
namespace {

template <class T>
struct AttentionMaskBackwardKernel {
  static constexpr int64_t kBlock = llmos::kBlock;
  using Packed = PackedTiles<T, TileLayouts{.key_rows = true, .value_rows = true}>;
  const AttentionBackwardArgs<T>& args;
  const AttentionCommonArgs<T>& a;
  Packed cache;
  BlockOperands<T> rows;
  TileGradient<T> gradient;

  AttentionMaskBackwardKernel(const AttentionMaskBackwardArgs<T>& args, Scratch scratch)
      : args(args.backward),
        a(args.backward.common),
        cache(a, scratch),
        rows(a, scratch, false),
        gradient(a, scratch) {}

  static int64_t scratch(const AttentionMaskBackwardArgs<T>& args) {
    const AttentionCommonArgs<T>& a = args.backward.common;
    return Packed::scratch(a) + BlockOperands<T>::scratch(a, false) + TileGradient<T>::scratch(a);
  }

  void add_block(int64_t batch, int64_t head, int64_t begin) {
    const Sequence& s = a.sequences[batch];
    const QueryBlock block(a, s, head, 1, begin);
    rows.pack(args, gradient.softmax_exp, block);
    const int64_t first = s.first / kTile * kTile, last = std::min(s.last, block.max_limit);
    for (int64_t at = first; at < last; at += kTile) {
      const KeyTile keys(a, s, at, last);
      if (gradient.multiply(block, batch, head / a.group(), keys, rows, cache))
        gradient.gradients(block, keys, last - first <= kTile, rows, {}, args.dmask);
    }
  }

  void run(const AttentionTask& task) {
    const bool all_heads = args.dmask.heads == 1, all_batch = args.dmask.batch == 1;
    const int64_t q_len = a.q_total, begin = task.block * kBlock;
    clear_mask_rows(args.dmask, task.sequence, task.kv_head, begin, begin + kBlock);
    for (int64_t b = 0; b < (all_batch ? args.dmask.query_batch : 1); ++b)
      for (int64_t h = 0; h < (all_heads ? a.heads : 1); ++h) {
        const int64_t batch = all_batch ? b : task.sequence, head = all_heads ? h : task.kv_head;
        if (args.dmask.q_len > 1) {
          add_block(batch, head, begin);
        } else {
          for (int64_t row = 0; row < q_len; row += kBlock) add_block(batch, head, row);
        }
      }
  }
};

const RegisterForDtypes<AttentionMaskBackwardKernel, AttentionMaskBackwardArgs>
    register_mask_backward;

}  // namespace
}  // namespace llmos
