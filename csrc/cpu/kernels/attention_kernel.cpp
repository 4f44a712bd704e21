// The attention forward: online softmax over tiles of keys (flash attention).
#include "attention_decode.h"
#include "attention_packed_tiles.h"

namespace llmos {
namespace {

// The online-softmax state of a block of rows: unnormalized out, maximum score m, sum of
// exponentials l, the shift of the exponentials, and alpha, which rescales earlier sums.
struct RunningSoftmax {
  float *out, *m, *l, *shift, *alpha;
};

// Store the weights of two keys where their scores are, or as one word.
template <class U>
[[gnu::always_inline]] inline void store_weights(float* scores, int64_t j, int64_t keys, F32 first,
                                                 F32 second) {
  if constexpr (kPerWord<U> == 1) {
    store(scores + j * kBlock, first);
    if (j + 1 < keys) store(scores + (j + 1) * kBlock, second);
  } else {
    store_bf16_pairs(scores + j / 2 * kBlock, first, second);
  }
}

// Turn the scores of kLanes rows into unnormalized weights, and return their sums. Two weights are
// added before they join the sum: half as many roundings of a large sum.
template <class U>
[[gnu::always_inline]] inline F32 tile_weights(const KeyTile& keys,
                                               const SoftmaxExp<U>& softmax_exp, F32 shift,
                                               float* scores) {
  const int64_t count = keys.count;
  F32 sum = {};
  const auto weight_of = [&](int64_t j) {
    return softmax_exp.exp(load<F32>(scores + j * kBlock), shift);
  };
  int64_t j = 0;
  for (; j + 2 <= count; j += 2) {
    const F32 first = weight_of(j), second = weight_of(j + 1);
    sum += first + second;
    store_weights<U>(scores, j, count, first, second);
  }
  if (j < count) {
    const F32 last = weight_of(j);
    sum += last;
    store_weights<U>(scores, j, count, last, F32{});
  }
  return sum;
}

// The same with dropout; the sums are those before it.
template <class U>
[[gnu::noinline, gnu::flatten]] F32 dropped_weights(const QueryBlock& block, const KeyTile& keys,
                                                    const SoftmaxExp<U>& softmax_exp,
                                                    const Dropout& dropout, int v, F32 shift,
                                                    float* scores) {
  F32 sum = {};
  const auto weight_of = [&](int64_t j) {
    return j < keys.count ? softmax_exp.exp(load<F32>(scores + j * kBlock), shift) : F32{};
  };
  for (int64_t j = 0; j < keys.count; j += 4) {
    F32 factors[4];
    dropout_of_keys(dropout, block, keys.begin + j, v, factors);
    for (int i = 0; i < 4 && j + i < keys.count; i += 2) {
      const F32 first = weight_of(j + i), second = weight_of(j + i + 1);
      sum += first + second;
      store_weights<U>(scores, j + i, keys.count, first * factors[i], second * factors[i + 1]);
    }
  }
  return sum;
}

// Turn a tile of scores into unnormalized weights, in the layout of a GEMM operand stored by
// columns ([key][row], or pairs of keys), and updates m, l, shift and alpha.
template <class U, int kVectors>
[[gnu::noinline, gnu::flatten]] void softmax_tile(const QueryBlock& block, const KeyTile& keys,
                                                  const SoftmaxExp<U>& softmax_exp,
                                                  const Dropout& dropout, MaskType type,
                                                  const float* mask, float* scores,
                                                  const RunningSoftmax& r) {
  F32 top[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) top[v] = load<F32>(r.m + v * kLanes);
  mask_scores<kVectors>(block, keys, softmax_exp, type, mask, scores,
                        [&](int64_t, int v, F32 x) { top[v] = max(top[v], x); });
  for (int v = 0; v < kVectors; ++v) {
    const int at = v * kLanes;
    const F32 seen = top[v] == -kInfinity ? F32{} : top[v];
    const F32 shift = softmax_exp.shift(softmax_exp.logit(seen));
    // Before the first visible key m is -infinity, and there are no sums to rescale.
    const F32 before =
        load<F32>(r.m + at) == -kInfinity ? F32{} - kInfinity : load<F32>(r.shift + at);
    const F32 alpha = softmax_exp.rescale(before, shift);
    const F32 sum = dropout.threshold
                        ? dropped_weights(block, keys, softmax_exp, dropout, v, shift, scores + at)
                        : tile_weights(keys, softmax_exp, shift, scores + at);
    store(r.m + at, top[v]);
    store(r.shift + at, shift);
    store(r.alpha + at, alpha);
    store(r.l + at, load<F32>(r.l + at) * alpha + sum);
  }
}

template <class T>
struct AttentionForwardKernel {
  static constexpr int64_t kBlock = llmos::kBlock;
  using U = WordOf<T>;
  using Packed = PackedTiles<T, TileLayouts{.key_rows = true, .value_inner = true}>;
  const AttentionForwardArgs<T>& args;
  const AttentionCommonArgs<T>& a;
  const SoftmaxExp<U> softmax_exp;
  const int64_t width;  // Floats per row of out in scratch memory.
  Packed cache;
  U *query, *line;
  float *scores, *mask;
  RunningSoftmax sums;

  AttentionForwardKernel(const AttentionForwardArgs<T>& args, Scratch scratch)
      : args(args),
        a(args.common),
        softmax_exp(a),
        width(to_vectors(a.v_dim)),
        cache(a, scratch),
        query(scratch.take<U>(kBlock * words<U>(a.dim))),  // In decode_tile: float rows [row][dim].
        line(scratch.take<U>(kLanes * kMaxDim)),
        scores(scratch.take(kTile * kBlock)),
        mask(scratch.take(kTile * kBlock)),
        sums{scratch.take(kBlock * width), scratch.take(kBlock), scratch.take(kBlock),
             scratch.take(kBlock), scratch.take(kBlock)} {}

  static int64_t scratch(const AttentionForwardArgs<T>& args) {
    const AttentionCommonArgs<T>& a = args.common;
    return Packed::scratch(a) + Scratch::size<U>(kBlock * words<U>(a.dim)) +
           Scratch::size<U>(kLanes * kMaxDim) + 2 * Scratch::size(kTile * kBlock) +
           Scratch::size(kBlock * to_vectors(a.v_dim)) + 4 * Scratch::size(kBlock);
  }

  void tile(const QueryBlock& block, const AttentionTask& task, const KeyTile& keys) {
    if (a.mask.type != MaskType::None && !pack_mask(a.mask, block, keys, mask)) return;
    cache.get(task.sequence, task.kv_head, keys.begin);
    const int64_t inner = words<U>(a.dim);
    head_dim_gemm(keys.count, block.vectors, inner, cache.key_rows, query, kBlock, scores, kBlock);
    if (a.softcap != 0) cap_scores(a, keys.count, block.vectors, scores, nullptr);
    with_vectors(block.vectors, [&](auto vectors) {
      softmax_tile<U, vectors>(block, keys, softmax_exp, a.dropout, a.mask.type, mask, scores,
                               sums);
    });
    small_gemm_in_parts<U, true, Update::ScaleAdd>(
        block.rows, width / kLanes, words<U>(keys.count), reinterpret_cast<const U*>(scores),
        kBlock, cache.value_inner, width, sums.out, width, sums.alpha);
  }

  // The same for decoding: few rows, in float32.
  void decode_tile(const QueryBlock& block, const AttentionTask& task, const KeyTile& keys) {
    if (a.mask.type != MaskType::None && !pack_mask(a.mask, block, keys, mask)) return;
    const Sequence& s = a.sequences[task.sequence];
    const float* rows = reinterpret_cast<const float*>(query);
    decode_scores(a, s, task.kv_head, keys, block.rows, rows, scores);
    if (a.softcap != 0) cap_scores(a, keys.count, 1, scores, nullptr);
    softmax_tile<float, 1>(block, keys, SoftmaxExp<float>(a), a.dropout, a.mask.type, mask, scores,
                           sums);
    decode_values(a, s, task.kv_head, keys, block.rows, scores, sums.alpha, sums.out);
  }

  void run(const AttentionTask& task) {
    const Sequence& s = a.sequences[task.sequence];
    const QueryBlock block(a, s, task.kv_head * a.group(), a.group(), task.block * kBlock);
    const auto query_row = [&](int64_t r) {
      return a.query.at(s.batch, block.head[r], block.index[r]);
    };
    const bool use_decode = uses_decode(a, s);
    if (use_decode) {
      // Vectors have more lanes than there are rows; their scores are 0.
      for (int64_t j = 0; j < kTile; ++j) store(scores + j * kBlock, F32{});
      for (int64_t r = 0; r < block.rows; ++r)
        pack_row(query_row(r), a.dim, a.dim, reinterpret_cast<float*>(query) + r * a.dim);
    } else {
      pack_by_columns(block, a.dim, query, line, query_row);
    }
    std::memset(sums.out, 0, kBlock * width * sizeof(float));
    for (int64_t i = 0; i < kBlock; ++i) {
      sums.m[i] = -kInfinity;
      sums.l[i] = sums.shift[i] = 0;
    }
    const int64_t last = std::min({task.end, s.last, block.max_limit});
    const int64_t from = std::max(task.begin, s.first / kTile * kTile);
    for (int64_t begin = from; begin < last; begin += kTile) {
      const KeyTile keys(a, s, begin, last);
      if (keys.any_unpadded) use_decode ? decode_tile(block, task, keys) : tile(block, task, keys);
    }
    task.partial ? finish_partial(block, task.partial) : finish(block);
  }

  F32 logit(int64_t at) const {
    const F32 m = load<F32>(sums.m + at);
    return m == -kInfinity ? F32{} : softmax_exp.logit(m);
  }

  void finish(const QueryBlock& block) {
    alignas(64) float m[kBlock], inverse[kBlock], factor[kBlock];
    for (int at = 0; at < block.vectors * kLanes; at += kLanes) {
      F32 l = load<F32>(sums.l + at), top = logit(at), alpha = F32{} + 1;
      if (a.sinks) {
        F32 sink;
        for (int i = 0; i < kLanes; ++i) sink[i] = a.sinks[block.head[at + i]];
        alpha = softmax_exp.add_sink(sink, top, l);
      }
      const F32 one_over_l = l == 0 ? F32{} : 1 / l;
      store(m + at, top);
      store(inverse + at, one_over_l);
      store(factor + at, alpha * one_over_l);
    }
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t stats = a.stats_at(block.batch, block.head[r], block.index[r]);
      a.m[stats] = m[r];
      a.inverse[stats] = inverse[r];
      T* out = args.out.at(block.batch, block.head[r], block.index[r]);
      const float* row = sums.out + r * width;
      sweep(a.v_dim, [&](auto part, int64_t i) {
        store(out + i, load<typename decltype(part)::V>(row + i) * factor[r]);
      });
    }
  }

  void finish_partial(const QueryBlock& block, float* to) {
    alignas(64) float m[kBlock];
    for (int at = 0; at < kBlock; at += kLanes) store(m + at, logit(at));
    for (int64_t r = 0; r < block.rows; ++r, to += a.v_dim + 2) {
      std::memcpy(to, sums.out + r * width, a.v_dim * sizeof(float));
      to[a.v_dim] = m[r];
      to[a.v_dim + 1] = sums.l[r];
    }
  }
};

template <class T>
void combine(const AttentionCommonArgs<T>& a, const float* partial, int64_t splits, int64_t stride,
             float sink, T* out, float* m, float* inverse) {
  const SoftmaxExp<WordOf<T>> softmax_exp(a);
  const int64_t v_dim = a.v_dim;
  float top = sink, l = 0;
  for (int64_t i = 0; i < splits; ++i)
    if (const float* p = partial + i * stride; p[v_dim + 1] != 0)
      top = top > p[v_dim] ? top : p[v_dim];
  float sums[kMaxDim] = {};
  if (sink != -kInfinity) l = softmax_exp.exp_sink(F32{} + sink, softmax_exp.shift(F32{} + top))[0];
  for (int64_t i = 0; i < splits; ++i) {
    const float* p = partial + i * stride;
    if (p[v_dim + 1] == 0) continue;
    // The same shifts that the exponentials were computed with, here and in the backward.
    const F32 weight =
        softmax_exp.rescale(softmax_exp.shift(F32{} + p[v_dim]), softmax_exp.shift(F32{} + top));
    l += p[v_dim + 1] * weight[0];
    sweep(v_dim, [&](auto part, int64_t j) {
      using V = typename decltype(part)::V;
      store(sums + j, fma(load<V>(p + j), V{} + weight[0], load<V>(sums + j)));
    });
  }
  *m = l == 0 ? 0 : top;
  *inverse = l == 0 ? 0 : 1 / l;
  sweep(v_dim, [&](auto part, int64_t j) {
    store(out + j, load<typename decltype(part)::V>(sums + j) * *inverse);
  });
}

template <class T, bool kRegister = kIsaBenefits<T>>
struct RegisterCombine {
  Register<CombineSplitsFn<T>> combine_{LLMOS_ISA, combine_splits<T>, &combine<T>};
};
template <class T>
struct RegisterCombine<T, false> {};

const RegisterForDtypes<AttentionForwardKernel, AttentionForwardArgs> register_forward;
const RegisterCombine<float> register_combine_f32;
const RegisterCombine<bf16> register_combine_bf16;
const RegisterCombine<f16> register_combine_f16;

}  // namespace
}  // namespace llmos
