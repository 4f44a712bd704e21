// The gradients of a tile of logits, for the attention backward and the gradient of attn_mask.
#pragma once

#include "attention_decode.h"
#include "attention_packed_tiles.h"

namespace llmos {
namespace {

// Values of each row of a block: the shift of the exponentials, 1 / l, delta = dout . out, and the
// weight of the sink. `excess` is what delta lacks, as far as tiles of keys have found it. For rows
// past the last, shift is infinite, so that their weights are 0.
struct RowStatistics {
  float *shift, *inverse, *delta, *sink, *excess;
};

// The packed operands of a block of query rows.
template <class T>
struct BlockOperands : RowStatistics {
  using U = WordOf<T>;
  U *query, *dout;              // [word][row]
  U *query_inner, *dout_inner;  // [word of rows][element]; null where not needed.
  U* line;

  BlockOperands(const AttentionCommonArgs<T>& a, Scratch& scratch, bool inner)
      : RowStatistics{scratch.take(kBlock), scratch.take(kBlock), scratch.take(kBlock),
                      scratch.take(kBlock), scratch.take(kBlock)},
        query(scratch.take<U>(kBlock * words<U>(a.dim))),
        dout(scratch.take<U>(kBlock * words<U>(a.v_dim))),
        query_inner(inner ? scratch.take<U>(kBlock * to_vectors(a.dim)) : nullptr),
        dout_inner(inner ? scratch.take<U>(kBlock * to_vectors(a.v_dim)) : nullptr),
        line(scratch.take<U>(kLanes * kMaxDim)) {}

  static int64_t scratch(const AttentionCommonArgs<T>& a, bool inner) {
    return Scratch::size<U>(kBlock * words<U>(a.dim)) +
           Scratch::size<U>(kBlock * words<U>(a.v_dim)) +
           inner * (Scratch::size<U>(kBlock * to_vectors(a.dim)) +
                    Scratch::size<U>(kBlock * to_vectors(a.v_dim))) +
           5 * Scratch::size(kBlock) + Scratch::size<U>(kLanes * kMaxDim);
  }

  void pack(const AttentionBackwardArgs<T>& args, const SoftmaxExp<U>& softmax_exp,
            const QueryBlock& block) {
    const AttentionCommonArgs<T>& a = args.common;
    const auto query_row = [&](int64_t r) {
      return a.query.at(block.batch, block.head[r], block.index[r]);
    };
    const auto dout_row = [&](int64_t r) {
      return args.dout.at(block.batch, block.head[r], block.index[r]);
    };
    pack_by_columns(block, a.dim, query, line, query_row);
    pack_by_columns(block, a.v_dim, dout, line, dout_row);
    if (query_inner) {
      pack_inner<U, T>(block.rows, a.dim, query_inner, query_row);
      pack_inner<U, T>(block.rows, a.v_dim, dout_inner, dout_row);
    }
    for (int64_t r = 0; r < block.vectors * kLanes; ++r) {
      const bool exists = r < block.rows;
      const int64_t at = a.stats_at(block.batch, block.head[r], block.index[r]);
      shift[r] = exists ? softmax_exp.shift(F32{} + a.m[at])[0] : kInfinity;
      inverse[r] = exists ? a.inverse[at] : 0;
      sink[r] = 0;
      if (a.sinks && exists) {
        const F32 logit = F32{} + a.sinks[block.head[r]];
        sink[r] = softmax_exp.exp_sink(logit, F32{} + shift[r])[0] * inverse[r];
      }
    }
    // delta is the diagonal of the same GEMM that computes dout . value. Where one key has all the
    // weight, out equals its value, and the gradient of its logit is then exactly 0.
    const int64_t n = words<U>(a.v_dim);
    alignas(64) float square[kLanes * kLanes];
    for (int64_t first = 0; first < block.vectors * kLanes; first += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t r = std::min(first + i, block.rows - 1);
        pack_row(args.out.at(block.batch, block.head[r], block.index[r]), a.v_dim, n * kPerWord<U>,
                 line + i * n);
      }
      head_dim_gemm(kLanes, 1, n, line, dout + first, kBlock, square, kLanes);
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t r = first + i;
        delta[r] = square[i * kLanes + i];
        excess[r] = -sink[r] * delta[r];
      }
    }
  }
};

// Where to write the weights after dropout and the gradients of the logits: [key][row], and with
// bfloat16 also [pair of keys][row]. Or the gradients alone, as floats.
template <class U>
struct TileOutputs {
  Element<U>*weights, *dlogits;
  float *dlogit_pairs, *dlogits_float;

  // Write the gradients of key j of `count` for row vector v; `before` are those of key j - 1.
  [[gnu::always_inline]] void put(int64_t j, int64_t count, int64_t v, F32 dlogit,
                                  F32& before) const {
    store(dlogits + j * kBlock + v * kLanes, dlogit);
    if constexpr (kPerWord<U> == 2) {
      float* pairs = dlogit_pairs + j / 2 * kBlock + v * kLanes;
      if (j % 2)
        store_bf16_pairs(pairs, before, dlogit);
      else if (j + 1 == count)
        store_bf16_pairs(pairs, dlogit, F32{});
      before = dlogit;
    }
  }
};

// Turn scores and dweights = dout . value into the gradients of the logits, p * (dweights -
// delta). kWhole: the tile has all keys that the block may see. Then delta is corrected to the mean
// of dweights weighted by p, so that gradients whose sum is 0 in theory have that sum here, too;
// the sink counts as a key whose dweight is 0.
template <bool kWhole, class U, int kVectors>
[[gnu::noinline, gnu::flatten]] void logit_gradients(const QueryBlock& block, const KeyTile& keys,
                                                     const SoftmaxExp<U>& softmax_exp,
                                                     const Dropout& dropout, MaskType type,
                                                     const float* mask, const RowStatistics& rows,
                                                     float* scores, float* dweights,
                                                     const TileOutputs<U>& to) {
  F32 shift[kVectors], inverse[kVectors], delta[kVectors], factors[kVectors][4], before[kVectors];
  F32 total[kVectors], excess[kVectors], part[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    part[v] = F32{};
    shift[v] = load<F32>(rows.shift + v * kLanes);
    inverse[v] = load<F32>(rows.inverse + v * kLanes);
    delta[v] = load<F32>(rows.delta + v * kLanes);
    before[v] = F32{};
    total[v] = load<F32>(rows.sink + v * kLanes);
    excess[v] = load<F32>(rows.excess + v * kLanes);
  }
  const auto put = [&](int64_t j, int v, F32 dlogit) {
    to.put(j, keys.count, v, dlogit, before[v]);
  };
  mask_scores<kVectors>(block, keys, softmax_exp, type, mask, scores, [&](int64_t j, int v, F32 x) {
    const int64_t at = j * kBlock + v * kLanes;
    const F32 p = softmax_exp.exp(x, shift[v]) * inverse[v];
    F32 weight = p, dp = load<F32>(dweights + at);
    if (dropout.threshold) {
      if (j % 4 == 0) dropout_of_keys(dropout, block, keys.begin + j, v, factors[v]);
      weight *= factors[v][j % 4];
      dp *= factors[v][j % 4];
    }
    if constexpr (kWhole) {
      if (to.weights) store(to.weights + at, weight);
      const F32 centered = dp - delta[v];
      part[v] = fma(p, centered, part[v]);
      total[v] += p;
      // A partial sum of 8 keys: fewer roundings of a large sum.
      if (j % 8 == 7 || j + 1 == keys.count) {
        excess[v] += part[v];
        part[v] = F32{};
      }
      store(scores + at, p);
      store(dweights + at, centered);
    } else {
      const F32 dlogit = p * (dp - delta[v]);
      if (to.weights) store(to.weights + at, weight);
      if (to.dlogits_float) return store(to.dlogits_float + at, dlogit);
      put(j, v, dlogit);
    }
  });
  if constexpr (kWhole) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      excess[v] /= max(total[v], F32{} + 0.5f);
      store(rows.excess + v * kLanes, excess[v]);
    }
    for (int64_t j = 0; j < keys.count; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = j * kBlock + v * kLanes;
        const F32 dlogit = load<F32>(scores + at) * (load<F32>(dweights + at) - excess[v]);
        if (to.dlogits_float)
          store(to.dlogits_float + at, dlogit);
        else
          put(j, v, dlogit);
      }
  }
}

// Write the gradients of the scores from those of the logits, whose sums over the keys are added to
// `sums` unless it is null. `slopes` are those of a softcap; null: none.
template <class U>
[[gnu::noinline]] void put_gradients(int64_t keys, int64_t vectors, const float* dlogits,
                                     const float* slopes, float* sums, const TileOutputs<U>& to) {
  for (int64_t v = 0; v < vectors; ++v) {
    F32 before = {}, sum = {}, part = {};
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t at = j * kBlock + v * kLanes;
      const F32 dlogit = load<F32>(dlogits + at);
      part += dlogit;
      // A partial sum of 8 keys: fewer roundings of a large sum.
      if (j % 8 == 7 || j + 1 == keys) {
        sum += part;
        part = F32{};
      }
      to.put(j, keys, v, slopes ? dlogit * load<F32>(slopes + at) : dlogit, before);
    }
    if (sums) store(sums + v * kLanes, load<F32>(sums + v * kLanes) + sum);
  }
}

// Add the gradients of `count` keys, from `begin` on, to a row of dmask.
inline void add_mask_row(const MaskGradient& dmask, F32 gradients, int64_t begin, int64_t count,
                         float* row) {
  if (dmask.k_len == 1) {
    *row += horizontal_sum(gradients);
  } else if (count == kLanes) {
    store(row + begin, load<F32>(row + begin) + gradients);
  } else {
    for (int64_t lane = 0; lane < count; ++lane) row[begin + lane] += gradients[lane];
  }
}

// Clear rows [begin, end) of dmask, of one head or, if all share one, of that.
inline void clear_mask_rows(const MaskGradient& dmask, int64_t batch, int64_t head, int64_t begin,
                            int64_t end) {
  end = std::min(end, dmask.q_len);
  std::memset(dmask.row(batch, head, begin), 0, (end - begin) * dmask.k_len * sizeof(float));
}

// Add a tile of gradients [key][row] to its place in dmask.
[[gnu::noinline]] inline void add_mask_gradients(const MaskGradient& dmask, const QueryBlock& block,
                                                 const KeyTile& keys, const float* tile) {
  for (int64_t first = 0; first < block.rows; first += kLanes) {
    const int64_t rows = std::min<int64_t>(kLanes, block.rows - first);
    float* to[kLanes];
    for (int64_t i = 0; i < rows; ++i)
      to[i] = dmask.row(block.batch, block.head[first + i], block.index[first + i]);
    for (int64_t j = 0; j < keys.count; j += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, keys.count - j);
      U32 v[kLanes] = {};
      for (int64_t i = 0; i < count; ++i) v[i] = load_bits<U32>(tile + (j + i) * kBlock + first);
      transpose(v);
      F32 sum = {};  // Of rows that share a row of dmask.
      for (int64_t i = 0; i < rows; ++i) {
        sum += std::bit_cast<F32>(v[i]);
        if (i + 1 < rows && to[i + 1] == to[i]) continue;
        add_mask_row(dmask, sum, keys.begin + j, count, to[i]);
        sum = F32{};
      }
    }
  }
}

// What the tiles of one block of query rows need.
template <class T>
struct TileGradient {
  using U = WordOf<T>;
  const AttentionCommonArgs<T>& a;
  const SoftmaxExp<U> softmax_exp;
  float *scores, *dweights, *mask, *slopes;  // [key][row]

  TileGradient(const AttentionCommonArgs<T>& a, Scratch& scratch)
      : a(a),
        softmax_exp(a),
        scores(scratch.take(kTile * kBlock)),
        dweights(scratch.take(kTile * kBlock)),
        mask(scratch.take(kTile * kBlock)),
        slopes(scratch.take(kTile * kBlock * (a.softcap != 0))) {}

  static int64_t scratch(const AttentionCommonArgs<T>& a) {
    return (3 + (a.softcap != 0)) * Scratch::size(kTile * kBlock);
  }

  // Compute scores = query . key and dweights = dout . value. Returns false if no key of the tile
  // is visible.
  template <class Packed>
  bool multiply(const QueryBlock& block, int64_t sequence, int64_t kv_head, const KeyTile& keys,
                const BlockOperands<T>& rows, Packed& cache) {
    if (!keys.any_unpadded) return false;
    if (a.mask.type != MaskType::None && !pack_mask(a.mask, block, keys, mask)) return false;
    cache.get(sequence, kv_head, keys.begin);
    query_key_scores(a, a.sequences[sequence], kv_head, block, keys, rows.query, cache.key_rows,
                     scores);
    if (a.softcap != 0) cap_scores(a, keys.count, block.vectors, scores, slopes);
    head_dim_gemm(keys.count, block.vectors, words<U>(a.v_dim), cache.value_rows, rows.dout, kBlock,
                  dweights, kBlock);
    return true;
  }

  // Write what `to` names, and add to dmask unless its data is null. whole: the tile has all keys
  // that the block may see.
  void gradients(const QueryBlock& block, const KeyTile& keys, bool whole,
                 const BlockOperands<T>& rows, const TileOutputs<U>& to,
                 const MaskGradient& dmask) {
    float* sums = a.sinks && to.dlogits && !whole ? rows.excess : nullptr;
    // Float gradients are written in place of dweights: only what changes them needs a second pass.
    const bool apart = !to.dlogits || a.softcap != 0 || sums || (dmask.data && kPerWord<U> == 2);
    const TileOutputs<U> floats{to.weights, nullptr, nullptr, dweights};
    with_vectors(block.vectors, [&](auto vectors) {
      const auto run =
          whole ? &logit_gradients<true, U, vectors> : &logit_gradients<false, U, vectors>;
      run(block, keys, softmax_exp, a.dropout, a.mask.type, mask, rows, scores, dweights,
          apart ? floats : to);
    });
    if (dmask.data) add_mask_gradients(dmask, block, keys, dweights);
    if (to.dlogits && apart)
      put_gradients(keys.count, block.vectors, dweights, a.softcap != 0 ? slopes : nullptr, sums,
                    to);
  }
};

}  // namespace
}  // namespace llmos
