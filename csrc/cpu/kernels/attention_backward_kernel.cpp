// The attention backward: gradients of query, key and value, and of attn_mask.
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

  // whole: the tile has all keys that the block may see.
  void gradients(const QueryBlock& block, const KeyTile& keys, bool whole,
                 const BlockOperands<T>& rows, const TileOutputs<U>& to) {
    float* sums = a.sinks && !whole ? rows.excess : nullptr;
    const bool apart = to.dlogits && (a.softcap != 0 || sums);
    const TileOutputs<U> floats{to.weights, nullptr, nullptr, dweights};
    with_vectors(block.vectors, [&](auto vectors) {
      const auto run =
          whole ? &logit_gradients<true, U, vectors> : &logit_gradients<false, U, vectors>;
      run(block, keys, softmax_exp, a.dropout, a.mask.type, mask, rows, scores, dweights,
          apart ? floats : to);
    });
    if (apart)
      put_gradients(keys.count, block.vectors, dweights, a.softcap != 0 ? slopes : nullptr, sums,
                    to);
  }
};

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
        dlogits(scratch.take<Element<U>>(kTile * kBlock)),
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

  void tile(const QueryBlock& block, const AttentionTask& task, const KeyTile& keys, bool whole) {
    if (!gradient.multiply(block, task.sequence, task.kv_head, keys, rows, cache)) return;
    gradient.gradients(block, keys, whole, rows,
                       {weights, dlogits, reinterpret_cast<float*>(dlogit_pairs), nullptr});
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
    const Sequence& s = a.sequences[task.sequence];
    std::memset(dkey, 0, s.k_len * width * sizeof(float));
    std::memset(dvalue, 0, s.k_len * v_width * sizeof(float));
    for (int64_t begin = 0; begin < a.group() * s.q_len; begin += kBlock) {
      const QueryBlock block(a, s, task.kv_head * a.group(), a.group(), begin);
      rows.pack(args, gradient.softmax_exp, block);
      std::memset(dquery, 0, kBlock * width * sizeof(float));
      const int64_t first = s.first / kTile * kTile, last = std::min(s.last, block.max_limit);
      for (int64_t at = first; at < last; at += kTile)
        tile(block, task, KeyTile(a, s, at, last), last - first <= kTile);
      if (args.sink_gradients)
        for (int64_t r = 0; r < block.rows; ++r)
          args.sink_gradients[a.stats_at(s.batch, block.head[r], block.index[r])] =
              -rows.sink[r] * (rows.delta[r] + rows.excess[r]);
      for (int64_t r = 0; r < block.rows; ++r)
        finish(dquery + r * width, a.scale, a.dim,
               args.dquery.at(s.batch, block.head[r], block.index[r]));
    }
    for (int64_t j = 0; j < s.k_len; ++j) {
      finish(dkey + j * width, a.scale, a.dim, args.dkey.at(s.batch, task.kv_head, s.k_begin + j));
      finish(dvalue + j * v_width, 1, a.v_dim,
             args.dvalue.at(s.batch, task.kv_head, s.k_begin + j));
    }
  }
};

// The gradient of attn_mask.
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

const RegisterForDtypes<AttentionBackwardKernel, AttentionBackwardArgs> register_backward;
const RegisterForDtypes<AttentionMaskBackwardKernel, AttentionMaskBackwardArgs>
    register_mask_backward;

}  // namespace
}  // namespace llmos
