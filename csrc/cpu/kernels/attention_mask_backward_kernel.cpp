// The gradient of attn_mask.
#include "attention_gradients.h"

namespace llmos {
namespace {

template <class T>
struct AttentionMaskBackwardKernel {
  static constexpr int64_t kBlock = llmos::kBlock;
  using Packed = PackedTiles<T, TileLayouts{.key_rows = true, .value_rows = true}>;
  const AttentionMaskBackwardArgs<T>& args;
  const AttentionCommonArgs<T>& a;
  Packed cache;
  BlockOperands<T> rows;
  TileGradient<T> gradient;

  AttentionMaskBackwardKernel(const AttentionMaskBackwardArgs<T>& args, Scratch scratch)
      : args(args),
        a(args.backward.common),
        cache(a, scratch),
        rows(a, scratch, false),
        gradient(a, scratch) {}

  static int64_t scratch(const AttentionMaskBackwardArgs<T>& args) {
    const AttentionCommonArgs<T>& a = args.backward.common;
    return Packed::scratch(a) + BlockOperands<T>::scratch(a, false) + TileGradient<T>::scratch(a);
  }

  // Add a tile of gradients [key][row] to its place in dmask.
  void add(const QueryBlock& block, const KeyTile& keys, const float* tile, float* head) {
    for (int64_t first = 0; first < block.rows; first += kLanes) {
      for (int64_t j = 0; j < keys.count; j += kLanes) {
        const int64_t count = std::min<int64_t>(kLanes, keys.count - j);
        U32 v[kLanes] = {};
        for (int64_t i = 0; i < count; ++i) v[i] = load_bits<U32>(tile + (j + i) * kBlock + first);
        transpose(v);
        const int64_t rows = std::min<int64_t>(kLanes, block.rows - first);
        if (args.q_len == 1) {
          for (int64_t i = 1; i < rows; ++i)
            v[0] = std::bit_cast<U32>(std::bit_cast<F32>(v[0]) + std::bit_cast<F32>(v[i]));
          add_row(std::bit_cast<F32>(v[0]), keys.begin + j, count, head);
          continue;
        }
        for (int64_t i = 0; i < rows; ++i)
          add_row(std::bit_cast<F32>(v[i]), keys.begin + j, count,
                  head + block.index[first + i] * args.k_len);
      }
    }
  }

  // Add the gradients of `count` keys, from `begin` on, to a row of dmask.
  void add_row(F32 gradients, int64_t begin, int64_t count, float* to) {
    if (args.k_len == 1) {
      *to += horizontal_sum(gradients);
    } else if (count == kLanes) {
      store(to + begin, load<F32>(to + begin) + gradients);
    } else {
      for (int64_t lane = 0; lane < count; ++lane) to[begin + lane] += gradients[lane];
    }
  }

  void add_block(int64_t batch, int64_t head, int64_t begin, float* to) {
    const Sequence& s = a.sequences[batch];
    const QueryBlock block(a, s, head, 1, begin);
    rows.pack(args.backward, gradient.softmax_exp, block);
    const int64_t first = s.first / kTile * kTile, last = std::min(s.last, block.max_limit);
    for (int64_t at = first; at < last; at += kTile) {
      const KeyTile keys(a, s, at, last);
      if (!gradient.multiply(block, batch, head / a.group(), keys, rows, cache)) continue;
      gradient.gradients(block, keys, last - first <= kTile, rows,
                         {nullptr, nullptr, nullptr, gradient.dweights});
      add(block, keys, gradient.dweights, to);
    }
  }

  // task.sequence and task.kv_head are the batch element and the head of the mask.
  void run(const AttentionTask& task) {
    const bool all_heads = args.heads == 1, all_batch = args.batch == 1;
    float* to = args.dmask + (task.sequence * args.heads + task.kv_head) * args.q_len * args.k_len;
    const int64_t q_len = a.sequences[0].q_len;
    for (int64_t b = 0; b < (all_batch ? args.query_batch : 1); ++b)
      for (int64_t h = 0; h < (all_heads ? a.heads : 1); ++h) {
        const int64_t batch = all_batch ? b : task.sequence, head = all_heads ? h : task.kv_head;
        if (args.q_len > 1) {
          add_block(batch, head, task.block * kBlock, to);
        } else {
          for (int64_t begin = 0; begin < q_len; begin += kBlock) add_block(batch, head, begin, to);
        }
      }
  }
};

const RegisterForDtypes<AttentionMaskBackwardKernel, AttentionMaskBackwardArgs>
    register_mask_backward;

}  // namespace
}  // namespace llmos
