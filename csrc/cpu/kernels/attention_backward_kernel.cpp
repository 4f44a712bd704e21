// The attention backward: gradients of query, key and value.
#include "attention_gradients.h"

namespace llmos {
namespace {

template <class T>
struct AttentionBackwardKernel {
  static constexpr int64_t kBlock = llmos::kBlock;
  using U = WordOf<T>;
  using Packed =
      PackedTiles<T, TileLayouts{.key_rows = true, .value_rows = true, .key_inner = true}>;
  const AttentionBackwardArgs<T>& args;
  const AttentionCommonArgs<T>& a;
  const int64_t width, v_width;
  Packed cache;
  BlockOperands<T> rows;
  TileGradient<T> gradient;
  // Weights after dropout, and the gradients of the logits: [key][row], and [pair of keys][row].
  Element<U>*weights, *dlogits;
  U* dlogit_pairs;
  float *dquery, *dkey, *dvalue;

  AttentionBackwardKernel(const AttentionBackwardArgs<T>& args, Scratch scratch)
      : args(args),
        a(args.common),
        width(to_vectors(a.dim)),
        v_width(to_vectors(a.v_dim)),
        cache(a, scratch),
        rows(a, scratch, true),
        gradient(a, scratch),
        weights(scratch.take<Element<U>>(kTile * kBlock)),
        dlogits(kPerWord<U> == 1 ? reinterpret_cast<Element<U>*>(gradient.dweights)
                                 : scratch.take<Element<U>>(kTile * kBlock)),
        dlogit_pairs(kPerWord<U> == 1 ? reinterpret_cast<U*>(dlogits)
                                      : scratch.take<U>(kTile / 2 * kBlock)),
        dquery(scratch.take(kBlock * width)),
        dkey(scratch.take(a.k_longest * width)),
        dvalue(scratch.take(a.k_longest * v_width)) {}

  static int64_t scratch(const AttentionBackwardArgs<T>& args) {
    const AttentionCommonArgs<T>& a = args.common;
    return Packed::scratch(a) + BlockOperands<T>::scratch(a, true) + TileGradient<T>::scratch(a) +
           3 * Scratch::size(kTile * kBlock) +
           Scratch::size((kBlock + a.k_longest) * to_vectors(a.dim)) + 32 +
           Scratch::size(a.k_longest * to_vectors(a.v_dim));
  }

  void tile(const QueryBlock& block, int64_t sequence, int64_t kv_head, const KeyTile& keys,
            bool whole) {
    if (!gradient.multiply(block, sequence, kv_head, keys, rows, cache)) return;
    gradient.gradients(block, keys, whole, rows,
                       {weights, dlogits, reinterpret_cast<float*>(dlogit_pairs), nullptr},
                       args.dmask);
    const int64_t inner = words<U>(block.rows), step = kBlock / kPerWord<U>;
    small_gemm_in_parts<U, false, Update::Add>(
        keys.count, v_width / kLanes, inner, reinterpret_cast<const U*>(weights), step,
        rows.dout_inner, v_width, dvalue + keys.begin * v_width, v_width);
    small_gemm_in_parts<U, false, Update::Add>(
        keys.count, width / kLanes, inner, reinterpret_cast<const U*>(dlogits), step,
        rows.query_inner, width, dkey + keys.begin * width, width);
    small_gemm_in_parts<U, true, Update::Add>(block.rows, width / kLanes, words<U>(keys.count),
                                              dlogit_pairs, kBlock, cache.key_inner, width, dquery,
                                              width);
  }

  static void finish(const float* from, float scale, int64_t n, T* to) {
    sweep(n, [&](auto part, int64_t i) {
      store(to + i, load<typename decltype(part)::V>(from + i) * scale);
    });
  }

  void run(const AttentionTask& task) {
    const bool all_heads = args.dmask.data && args.dmask.heads == 1;
    const bool all_batch = args.dmask.data && args.dmask.batch == 1;
    if (args.dmask.data)
      clear_mask_rows(args.dmask, task.sequence, task.kv_head, 0, args.dmask.q_len);
    for (int64_t b = 0; b < (all_batch ? args.dmask.query_batch : 1); ++b)
      for (int64_t h = 0; h < (all_heads ? a.kv_heads : 1); ++h)
        head(all_batch ? b : task.sequence, all_heads ? h : task.kv_head);
  }

  // Compute the gradients of one key head and its query heads.
  void head(int64_t sequence, int64_t kv_head) {
    const Sequence& s = a.sequences[sequence];
    std::memset(dkey, 0, s.k_len * width * sizeof(float));
    std::memset(dvalue, 0, s.k_len * v_width * sizeof(float));
    for (int64_t begin = 0; begin < a.group() * s.q_len; begin += kBlock) {
      const QueryBlock block(a, s, kv_head * a.group(), a.group(), begin);
      rows.pack(args, gradient.softmax_exp, block);
      std::memset(dquery, 0, kBlock * width * sizeof(float));
      const int64_t first = s.first / kTile * kTile, last = std::min(s.last, block.max_limit);
      for (int64_t at = first; at < last; at += kTile)
        tile(block, sequence, kv_head, KeyTile(a, s, at, last), last - first <= kTile);
      if (args.sink_gradients)
        for (int64_t r = 0; r < block.rows; ++r)
          args.sink_gradients[a.stats_at(s.batch, block.head[r], block.index[r])] =
              -rows.sink[r] * (rows.delta[r] + rows.excess[r]);
      for (int64_t r = 0; r < block.rows; ++r)
        finish(dquery + r * width, a.scale, a.dim,
               args.dquery.at(s.batch, block.head[r], block.index[r]));
    }
    for (int64_t j = 0; j < s.k_len; ++j) {
      finish(dkey + j * width, a.scale, a.dim, args.dkey.at(s.batch, kv_head, s.k_begin + j));
      finish(dvalue + j * v_width, 1, a.v_dim, args.dvalue.at(s.batch, kv_head, s.k_begin + j));
    }
  }
};

const RegisterForDtypes<AttentionBackwardKernel, AttentionBackwardArgs> register_backward;

}  // namespace
}  // namespace llmos
