#include "attention_packed_tiles.h"
#include "attention_decode.h"

namespace llmos {
namespace {

template <class T>
struct Weights {
  static constexpr int64_t kBlock = llmos::kBlock;
  using U = UnitOf<T>;
  using Packed = Cache<T, Forms{.key_rows = true}>;
  const AttentionWeights<T>& args;
  const Attention<T>& a;
  const Exponent<U> exponent;
  Packed cache;
  U *query, *line;
  float *products, *mask, *sums, *shift, *inverse;

  Weights(const AttentionWeights<T>& args, Scratch scratch)
      : args(args),
        a(args.of),
        exponent(a),
        cache(a, scratch),
        query(scratch.take<U>(kBlock * units<U>(a.dim))),
        line(scratch.take<U>(kLanes * kMaxDim)),
        products(scratch.take(kTile * kBlock)),
        mask(scratch.take(kTile * kBlock)),
        sums(scratch.take(padded_keys(a) * kBlock)),
        shift(scratch.take(kBlock)),
        inverse(scratch.take(kBlock)) {}

  static int64_t padded_keys(const Attention<T>& a) { return to_vectors(a.k_longest); }

  static int64_t scratch(const AttentionWeights<T>& args) {
    const Attention<T>& a = args.of;
    return Packed::scratch(a) + Scratch::size<U>(kBlock * units<U>(a.dim)) +
           Scratch::size<U>(kLanes * kMaxDim) + 2 * Scratch::size(kTile * kBlock) +
           Scratch::size(padded_keys(a) * kBlock) + 2 * Scratch::size(kBlock);
  }

  // Adds the weights of one head, times `part`, to sums [key][row].
  void add(int64_t sequence, int64_t head, int64_t begin, float part) {
    const Sequence& s = a.sequences[sequence];
    const Block block(a, s, head, 1, begin);
    pack_by_columns(block, a.dim, query, line,
                    [&](int64_t r) { return a.query.at(s.batch, head, block.index[r]); });
    for (int64_t r = 0; r < block.vectors * kLanes; ++r) {
      const int64_t at = a.stats_at(s.batch, head, block.index[r]);
      shift[r] = exponent.shift(F32{} + a.m[at])[0];
      inverse[r] = a.inverse[at] * part;
    }
    const int64_t last = std::min(s.last, block.limit_most);
    for (int64_t at = s.first / kTile * kTile; at < last; at += kTile) {
      const Keys keys(a, s, at, last);
      if (!keys.any) continue;
      if (a.mask.type != MaskType::None && !pack_mask(a.mask, block, keys, mask)) continue;
      cache.get(sequence, head / a.group(), keys.begin);
      query_products(a, s, head / a.group(), block, keys, query, cache.key_rows, products);
      with_vectors(block.vectors, [&](auto vectors) { add_tile<vectors>(block, keys); });
    }
  }

  template <int kVectors>
  [[gnu::noinline, gnu::flatten]] void add_tile(const Block& block, const Keys& keys) {
    F32 factors[kVectors][4];
    mask_products<kVectors>(block, keys, exponent, a.mask.type, mask, products,
                            [&](int64_t j, int v, F32 x) {
                              const int lane = v * kLanes;
                              F32 p = exponent.power(x, load<F32>(shift + lane));
                              p *= load<F32>(inverse + lane);
                              if (a.dropout.threshold) {
                                if (j % 4 == 0)
                                  dropout_of_keys(a.dropout, block, keys.begin + j, v, factors[v]);
                                p *= factors[v][j % 4];
                              }
                              float* to = sums + (keys.begin + j) * kBlock + lane;
                              store(to, load<F32>(to) + p);
                            });
  }

  // task.kv_head is a query head, or 0 where the mean over all of them is wanted.
  void run(const AttentionTask& task) {
    const Sequence& s = a.sequences[task.sequence];
    const int64_t begin = task.block * kBlock, rows = std::min<int64_t>(kBlock, s.q_len - begin);
    std::memset(sums, 0, padded_keys(a) * kBlock * sizeof(float));
    if (args.mean) {
      for (int64_t h = 0; h < a.heads; ++h) add(task.sequence, h, begin, 1 / float(a.heads));
    } else {
      add(task.sequence, task.kv_head, begin, 1);
    }
    T* out = args.out +
             ((s.batch * (args.mean ? 1 : a.heads) + task.kv_head) * a.q_total + begin) * s.k_len;
    for (int64_t first = 0; first < rows; first += kLanes) {
      for (int64_t j = 0; j < s.k_len; j += kLanes) {
        U32 v[kLanes];
        for (int i = 0; i < kLanes; ++i) v[i] = load_bits<U32>(sums + (j + i) * kBlock + first);
        transpose(v);
        for (int64_t i = 0; i < std::min<int64_t>(kLanes, rows - first); ++i) {
          T* to = out + (first + i) * s.k_len + j;
          const F32 row = std::bit_cast<F32>(v[i]);
          if (j + kLanes <= s.k_len)
            store(to, row);
          else
            for (int64_t lane = 0; j + lane < s.k_len; ++lane) store(to + lane, float(row[lane]));
        }
      }
    }
  }
};

const KernelBuilds<Weights, AttentionWeights> builds;

}  // namespace
}  // namespace llmos
