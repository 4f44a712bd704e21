// The attention weights as a tensor, of each head or averaged over the heads.
#include "attention_decode.h"
#include "attention_packed_tiles.h"

namespace llmos {
namespace {

template <class T>
struct AttentionWeightsKernel {
  static constexpr int64_t kBlock = llmos::kBlock;
  using U = WordOf<T>;
  using Packed = PackedTiles<T, TileLayouts{.key_rows = true}>;
  const AttentionWeightsArgs<T>& args;
  const AttentionCommonArgs<T>& a;
  const SoftmaxExp<U> softmax_exp;
  Packed cache;
  U *query, *line;
  float *scores, *mask, *sums, *shift, *inverse;

  AttentionWeightsKernel(const AttentionWeightsArgs<T>& args, Scratch scratch)
      : args(args),
        a(args.common),
        softmax_exp(a),
        cache(a, scratch),
        query(scratch.take<U>(kBlock * words<U>(a.dim))),
        line(scratch.take<U>(kLanes * kMaxDim)),
        scores(scratch.take(kTile * kBlock)),
        mask(scratch.take(kTile * kBlock)),
        sums(scratch.take(padded_keys(a) * kBlock)),
        shift(scratch.take(kBlock)),
        inverse(scratch.take(kBlock)) {}

  static int64_t padded_keys(const AttentionCommonArgs<T>& a) { return to_vectors(a.k_longest); }

  static int64_t scratch(const AttentionWeightsArgs<T>& args) {
    const AttentionCommonArgs<T>& a = args.common;
    return Packed::scratch(a) + Scratch::size<U>(kBlock * words<U>(a.dim)) +
           Scratch::size<U>(kLanes * kMaxDim) + 2 * Scratch::size(kTile * kBlock) +
           Scratch::size(padded_keys(a) * kBlock) + 2 * Scratch::size(kBlock);
  }

  // Add `factor` times the weights of one head to sums [key][row].
  void add(int64_t sequence, int64_t head, int64_t begin, float factor) {
    const Sequence& s = a.sequences[sequence];
    const QueryBlock block(a, s, head, 1, begin);
    pack_by_columns(block, a.dim, query, line,
                    [&](int64_t r) { return a.query.at(s.batch, head, block.index[r]); });
    for (int64_t r = 0; r < block.vectors * kLanes; ++r) {
      const int64_t at = a.stats_at(s.batch, head, block.index[r]);
      shift[r] = softmax_exp.shift(F32{} + a.m[at])[0];
      inverse[r] = a.inverse[at] * factor;
    }
    const int64_t last = std::min(s.last, block.max_limit);
    for (int64_t at = s.first / kTile * kTile; at < last; at += kTile) {
      const KeyTile keys(a, s, at, last);
      if (!keys.any_unpadded) continue;
      if (a.mask.type != MaskType::None && !pack_mask(a.mask, block, keys, mask)) continue;
      cache.get(sequence, head / a.group(), keys.begin);
      query_key_scores(a, s, head / a.group(), block, keys, query, cache.key_rows, scores);
      if (a.softcap != 0) cap_scores(a, keys.count, block.vectors, scores, nullptr);
      with_vectors(block.vectors, [&](auto vectors) { add_tile<vectors>(block, keys); });
    }
  }

  template <int kVectors>
  [[gnu::noinline, gnu::flatten]] void add_tile(const QueryBlock& block, const KeyTile& keys) {
    F32 factors[kVectors][4];
    mask_scores<kVectors>(block, keys, softmax_exp, a.mask.type, mask, scores,
                          [&](int64_t j, int v, F32 x) {
                            const int lane = v * kLanes;
                            F32 p = softmax_exp.exp(x, load<F32>(shift + lane));
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

  // task.kv_head is a query head, or 0 for the mean over all heads.
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

const RegisterForDtypes<AttentionWeightsKernel, AttentionWeightsArgs> register_weights;

}  // namespace
}  // namespace llmos
