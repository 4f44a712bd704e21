// PackedTiles: the keys and values of one head in VNNI layout. Tiles stay packed from one block of
// query rows to the next.
#pragma once

#include "attention_tiles.h"

namespace llmos {
namespace {

// The layouts that a kernel needs. Rows: a left operand, [key][word]. Inner: a right operand whose
// inner dimension runs over the keys.
struct TileLayouts {
  bool key_rows = false, value_rows = false, key_inner = false, value_inner = false;
};

template <class T, TileLayouts kLayouts>
class PackedTiles {
 public:
  using U = WordOf<T>;
  U *key_rows, *value_rows, *key_inner, *value_inner;  // The tile of the last call of get().

  PackedTiles(const AttentionCommonArgs<T>& a, Scratch& scratch)
      : a_(a), slots_(slots(a)), filled_(scratch.take<int8_t>(slots_)) {
    const Sizes size(a);
    for (int i = 0; i < 4; ++i) packed_[i] = scratch.take<U>(slots_ * size.layout[i]);
  }

  static int64_t scratch(const AttentionCommonArgs<T>& a) {
    const int64_t n = slots(a);
    int64_t floats = Scratch::size<int8_t>(n);
    for (int64_t size : Sizes(a).layout) floats += Scratch::size<U>(n * size);
    return floats;
  }

  // Pack the tile of keys from `begin` on, unless it is packed already. It packs the whole tile,
  // also the keys that this block of rows does not see. Tiles beyond the last slot share that slot.
  void get(int64_t sequence, int64_t head, int64_t begin) {
    const Sequence& s = a_.sequences[sequence];
    if (sequence != sequence_ || head != head_) {
      sequence_ = sequence;
      head_ = head;
      std::memset(filled_, 0, slots_);
    }
    const int64_t slot = std::min(begin / kTile, slots_ - 1);
    const Sizes size(a_);
    U** const pointers[] = {&key_rows, &value_rows, &key_inner, &value_inner};
    for (int i = 0; i < 4; ++i) *pointers[i] = packed_[i] + slot * size.layout[i];
    if (filled_[slot]) return;
    const KeyTile tile(a_, s, begin, s.last);
    filled_[slot] = slot < slots_ - 1 || s.k_len <= slots_ * kTile;
    if (kLayouts.key_rows) pack_rows(a_.key, s, head, tile, a_.dim, key_rows);
    if (kLayouts.value_rows) pack_rows(a_.value, s, head, tile, a_.v_dim, value_rows);
    if (kLayouts.key_inner) pack_inner_keys(a_.key, s, head, tile, a_.dim, key_inner);
    if (kLayouts.value_inner) pack_inner_keys(a_.value, s, head, tile, a_.v_dim, value_inner);
  }

 private:
  static constexpr int64_t kFloats = 1 << 20;  // Words for packed tiles: 4 MiB.

  // The number of words of a tile in each layout.
  struct Sizes {
    int64_t layout[4], total;
    explicit Sizes(const AttentionCommonArgs<T>& a) : total(0) {
      constexpr int64_t inner = kTile / kPerWord<U>;
      layout[0] = kLayouts.key_rows * kTile * words<U>(a.dim);
      layout[1] = kLayouts.value_rows * kTile * words<U>(a.v_dim);
      layout[2] = kLayouts.key_inner * inner * to_vectors(a.dim);
      layout[3] = kLayouts.value_inner * inner * to_vectors(a.v_dim);
      for (int64_t n : layout) total += n;
    }
  };

  static int64_t slots(const AttentionCommonArgs<T>& a) {
    const int64_t tiles = (a.k_longest + kTile - 1) / kTile;
    return std::min(tiles, std::max<int64_t>(1, kFloats / Sizes(a).total));
  }

  const AttentionCommonArgs<T>& a_;
  int64_t slots_, sequence_ = -1, head_ = -1;
  int8_t* filled_;
  U* packed_[4];
};

}  // namespace
}  // namespace llmos
