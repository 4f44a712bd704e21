#include "attention_packed_tiles.h"
#include "attention_decode.h"

namespace llmos {
namespace {

// What a block of rows has summed up so far.
struct Rows {
  float *out, *m, *l, *shift, *alpha;
};

// Turns a tile of products into powers, for a right operand or a left one by columns, and updates
// m, l and shift; alpha is what earlier sums have to be multiplied by.
template <class U, int kVectors>
[[gnu::noinline, gnu::flatten]] void softmax_tile(const Block& block, const Keys& keys,
                                                  const Exponent<U>& exponent,
                                                  const Dropout& dropout, MaskType type,
                                                  const float* mask, float* products,
                                                  const Rows& r) {
  // The sum is of pairs: half the roundings of a large sum.
  F32 top[kVectors], shift[kVectors], sum[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) top[v] = load<F32>(r.m + v * kLanes);
  mask_products<kVectors>(block, keys, exponent, type, mask, products,
                          [&](int64_t, int v, F32 x) { top[v] = max(top[v], x); });
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const int at = v * kLanes;
    const F32 seen = top[v] == -kInfinity ? F32{} : top[v];
    shift[v] = exponent.shift(exponent.logit(seen));
    // Before the first visible key m is -infinity: nothing was summed.
    const F32 before =
        load<F32>(r.m + at) == -kInfinity ? F32{} - kInfinity : load<F32>(r.shift + at);
    const F32 alpha = exponent.change(before, shift[v]);
    store(r.m + at, top[v]);
    store(r.shift + at, shift[v]);
    store(r.alpha + at, alpha);
    sum[v] = F32{};
    store(r.l + at, load<F32>(r.l + at) * alpha);
  }
  const auto power = [&](int64_t j, int v) {
    return exponent.power(load<F32>(products + j * kBlock + v * kLanes), shift[v]);
  };
  const auto put = [&](int64_t j, int v, F32 first, F32 second) {
    if constexpr (kPerUnit<U> == 1) {
      store(products + j * kBlock + v * kLanes, first);
      if (j + 1 < keys.count) store(products + (j + 1) * kBlock + v * kLanes, second);
    } else {
      store_pairs(products + j / 2 * kBlock + v * kLanes, first, second);
    }
  };
  if (dropout.threshold) {
    for (int64_t j = 0; j < keys.count; j += 4) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        F32 factors[4];
        dropout_of_keys(dropout, block, keys.begin + j, v, factors);
        for (int i = 0; i < 4 && j + i < keys.count; i += 2) {
          const F32 first = power(j + i, v);
          const F32 second = j + i + 1 < keys.count ? power(j + i + 1, v) : F32{};
          sum[v] += first + second;
          put(j + i, v, first * factors[i], second * factors[i + 1]);
        }
      }
    }
  } else {
    int64_t j = 0;
    for (; j + 2 <= keys.count; j += 2)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const F32 first = power(j, v), second = power(j + 1, v);
        sum[v] += first + second;
        put(j, v, first, second);
      }
    if (j < keys.count)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const F32 first = power(j, v);
        sum[v] += first;
        put(j, v, first, F32{});
      }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) store(r.l + v * kLanes, load<F32>(r.l + v * kLanes) + sum[v]);
}

template <class T>
struct Forward {
  static constexpr int64_t kBlock = llmos::kBlock;
  using U = UnitOf<T>;
  using Packed = Cache<T, Forms{.key_rows = true, .value_inner = true}>;
  const AttentionForward<T>& args;
  const Attention<T>& a;
  const Exponent<U> exponent;
  const int64_t width;  // Of a row of out in scratch.
  Packed cache;
  U *query, *line;
  float *products, *mask;
  Rows sums;

  Forward(const AttentionForward<T>& args, Scratch scratch)
      : args(args),
        a(args.of),
        exponent(a),
        width(to_vectors(a.v_dim)),
        cache(a, scratch),
        query(scratch.take<U>(kBlock * units<U>(a.dim))),  // Or floats of few rows.
        line(scratch.take<U>(kLanes * kMaxDim)),
        products(scratch.take(kTile * kBlock)),
        mask(scratch.take(kTile * kBlock)),
        sums{scratch.take(kBlock * width), scratch.take(kBlock), scratch.take(kBlock),
             scratch.take(kBlock), scratch.take(kBlock)} {}

  static int64_t scratch(const AttentionForward<T>& args) {
    const Attention<T>& a = args.of;
    return Packed::scratch(a) + Scratch::size<U>(kBlock * units<U>(a.dim)) +
           Scratch::size<U>(kLanes * kMaxDim) + 2 * Scratch::size(kTile * kBlock) +
           Scratch::size(kBlock * to_vectors(a.v_dim)) + 4 * Scratch::size(kBlock);
  }

  void tile(const Block& block, const AttentionTask& task, const Keys& keys) {
    if (a.mask.type != MaskType::None && !pack_mask(a.mask, block, keys, mask)) return;
    cache.get(task.sequence, task.kv_head, keys.begin);
    const int64_t inner = units<U>(a.dim);
    dots(keys.count, block.vectors, inner, cache.key_rows, query, kBlock, products, kBlock);
    with_vectors(block.vectors, [&](auto vectors) {
      softmax_tile<U, vectors>(block, keys, exponent, a.dropout, a.mask.type, mask, products, sums);
    });
    product_in_parts<U, true, Into::Scale>(block.rows, width / kLanes, units<U>(keys.count),
                                           reinterpret_cast<const U*>(products), kBlock,
                                           cache.value_inner, width, sums.out, width, sums.alpha);
  }

  // The same for few rows, in float.
  void few_tile(const Block& block, const AttentionTask& task, const Keys& keys) {
    if (a.mask.type != MaskType::None && !pack_mask(a.mask, block, keys, mask)) return;
    const Sequence& s = a.sequences[task.sequence];
    const float* rows = reinterpret_cast<const float*>(query);
    few_products(a, s, task.kv_head, keys, block.rows, rows, products);
    softmax_tile<float, 1>(block, keys, Exponent<float>(a), a.dropout, a.mask.type, mask, products,
                           sums);
    few_values(a, s, task.kv_head, keys, block.rows, products, sums.alpha, sums.out);
  }

  void run(const AttentionTask& task) {
    const Sequence& s = a.sequences[task.sequence];
    const Block block(a, s, task.kv_head * a.group(), a.group(), task.block * kBlock);
    const auto query_row = [&](int64_t r) {
      return a.query.at(s.batch, block.head[r], block.index[r]);
    };
    const bool few = are_few(a, s);
    if (few) {
      // Lanes that have no row.
      for (int64_t j = 0; j < kTile; ++j) store(products + j * kBlock, F32{});
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
    const int64_t last = std::min({task.end, s.last, block.limit_most});
    const int64_t from = std::max(task.begin, s.first / kTile * kTile);
    for (int64_t begin = from; begin < last; begin += kTile) {
      const Keys keys(a, s, begin, last);
      if (keys.any) few ? few_tile(block, task, keys) : tile(block, task, keys);
    }
    task.partial ? finish_partial(block, task.partial) : finish(block);
  }

  F32 logit(int64_t at) const {
    const F32 m = load<F32>(sums.m + at);
    return m == -kInfinity ? F32{} : exponent.logit(m);
  }

  void finish(const Block& block) {
    alignas(64) float m[kBlock], inverse[kBlock];
    for (int at = 0; at < kBlock; at += kLanes) {
      const F32 l = load<F32>(sums.l + at);
      store(m + at, logit(at));
      store(inverse + at, l == 0 ? F32{} : 1 / l);
    }
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t stats = a.stats_at(block.batch, block.head[r], block.index[r]);
      a.m[stats] = m[r];
      a.inverse[stats] = inverse[r];
      T* out = args.out.at(block.batch, block.head[r], block.index[r]);
      const float* row = sums.out + r * width;
      sweep(a.v_dim, [&](auto part, int64_t i) {
        store(out + i, load<typename decltype(part)::V>(row + i) * inverse[r]);
      });
    }
  }

  void finish_partial(const Block& block, float* to) {
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
void combine(const Attention<T>& a, const float* partial, int64_t splits, int64_t stride, T* out,
             float* m, float* inverse) {
  const Exponent<UnitOf<T>> exponent(a);
  const int64_t v_dim = a.v_dim;
  float top = -kInfinity, l = 0;
  for (int64_t i = 0; i < splits; ++i)
    if (const float* p = partial + i * stride; p[v_dim + 1] != 0)
      top = top > p[v_dim] ? top : p[v_dim];
  float sums[kMaxDim] = {};
  for (int64_t i = 0; i < splits; ++i) {
    const float* p = partial + i * stride;
    if (p[v_dim + 1] == 0) continue;
    // Of the very shifts that powers are taken with, here and in the backward.
    const F32 weight =
        exponent.change(exponent.shift(F32{} + p[v_dim]), exponent.shift(F32{} + top));
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

const KernelBuilds<Forward, AttentionForward> builds;
const Build<CombineSplits<float>> combine_f32{LLMOS_ISA, combine_splits<float>,
                                              &combine<float>};
const Build<CombineSplits<bf16>> combine_bf16{LLMOS_ISA, combine_splits<bf16>,
                                              &combine<bf16>};
const Build<CombineSplits<f16>> combine_f16{LLMOS_ISA, combine_splits<f16>, &combine<f16>};

}  // namespace
}  // namespace llmos
