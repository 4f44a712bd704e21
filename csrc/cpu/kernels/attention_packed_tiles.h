// Packed tiles of one key head, kept from one block of query rows to the next.
#pragma once

#include "attention_tiles.h"

namespace llmos {
namespace {

// The forms a tile is needed in. Rows: a left operand, [key][unit]. Inner: a right operand whose
// inner dimension are the keys.
struct Forms {
  bool key_rows = false, value_rows = false, key_inner = false, value_inner = false;
};

template <class T, Forms kForms>
class Cache {
 public:
  using U = UnitOf<T>;
  U *key_rows, *value_rows, *key_inner, *value_inner;  // Of the tile that get() was last asked for.

  Cache(const Attention<T>& a, Scratch& scratch)
      : a_(a), slots_(slots(a)), filled_(scratch.take<int8_t>(slots_)) {
    const Sizes size(a);
    for (int i = 0; i < 4; ++i) packed_[i] = scratch.take<U>(slots_ * size.of[i]);
  }

  static int64_t scratch(const Attention<T>& a) {
    const int64_t n = slots(a);
    int64_t floats = Scratch::size<int8_t>(n);
    for (int64_t size : Sizes(a).of) floats += Scratch::size<U>(n * size);
    return floats;
  }

  // Packs the tile from key `begin` on, if it is not packed yet: all of it, whatever part of it
  // this block of rows sees. Tiles that do not fit share the last slot.
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
    for (int i = 0; i < 4; ++i) *pointers[i] = packed_[i] + slot * size.of[i];
    if (filled_[slot]) return;
    const Keys tile(a_, s, begin, s.last);
    filled_[slot] = slot < slots_ - 1 || s.k_len <= slots_ * kTile;
    if (kForms.key_rows) pack_rows(a_.key, s, head, tile, a_.dim, key_rows);
    if (kForms.value_rows) pack_rows(a_.value, s, head, tile, a_.v_dim, value_rows);
    if (kForms.key_inner) pack_inner_keys(a_.key, s, head, tile, a_.dim, key_inner);
    if (kForms.value_inner) pack_inner_keys(a_.value, s, head, tile, a_.v_dim, value_inner);
  }

 private:
  static constexpr int64_t kFloats = 1 << 20;  // More would not stay in a cache of the machine.

  // Units in a tile of each form.
  struct Sizes {
    int64_t of[4], all;
    explicit Sizes(const Attention<T>& a) : all(0) {
      constexpr int64_t inner = kTile / kPerUnit<U>;
      of[0] = kForms.key_rows * kTile * units<U>(a.dim);
      of[1] = kForms.value_rows * kTile * units<U>(a.v_dim);
      of[2] = kForms.key_inner * inner * to_vectors(a.dim);
      of[3] = kForms.value_inner * inner * to_vectors(a.v_dim);
      for (int64_t n : of) all += n;
    }
  };

  static int64_t slots(const Attention<T>& a) {
    const int64_t tiles = (a.k_longest + kTile - 1) / kTile;
    return std::min(tiles, std::max<int64_t>(1, kFloats / Sizes(a).all));
  }

  const Attention<T>& a_;
  int64_t slots_, sequence_ = -1, head_ = -1;
  int8_t* filled_;
  U* packed_[4];
};

}  // namespace
}  // namespace llmos
