// Products by the CPU's own matrix tiles (AMX): of 16 rows with 16 units, or sums, each.
#pragma once

#include "vnni_layout.h"

namespace llmos {
namespace {

#if defined(__AMX_TILE__)
template <class Unit>
constexpr bool kInTiles = kPerUnit<Unit> > 1;

constexpr int64_t kTileRows = 16, kTileUnits = 16;
static_assert(kLanes == 16);

// Sums of up to 32 rows and two vectors are in tiles 0 to 3, row by row, units of the left operand
// in 4 and 5, of the right operand in 6 and 7. All may hold less than they could.
struct TileShapes {
  uint8_t first_rows = 0, second_rows = 0, units = 0;

  bool operator==(const TileShapes&) const = default;
};

// What this thread's tiles are set up for; without rows they are not.
thread_local TileShapes tile_shapes;

// The compiler does not know of the memory that instructions on tiles read and write.
[[gnu::always_inline]] inline void tiles_fence() { asm volatile("" ::: "memory"); }

[[gnu::noinline]] inline void set_tiles(const TileShapes& shapes) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};  // Of a row.
    uint8_t rows[16] = {};
  } config;
  const auto [first, second, units] = shapes;
  const uint8_t rows[8] = {first, first, second, second, first, second, units, units};
  for (int i = 0; i < 8; ++i) {
    const bool left = i == 4 || i == 5;
    config.rows[i] = rows[i];
    config.bytes[i] = rows[i] ? 4 * (left ? units : kLanes) : 0;
  }
  tiles_fence();
  _tile_loadconfig(&config);
  tile_shapes = shapes;
}

// Lives as long as a thread's tasks do, and leaves its tiles as they were.
struct TilesInUse {
  ~TilesInUse() {
    if (tile_shapes == TileShapes{}) return;
    _tile_release();
    tile_shapes = {};
  }
};

// Sums of one or two tiles of rows, and of vectors, over k units: whole tiles, or one part of one.
template <class Unit, bool kAdd, bool kTwoRows, bool kTwoVectors>
[[gnu::always_inline]] inline void tile_step(const Unit* a, int64_t a_step, const Unit* b,
                                             int64_t b_step, int64_t k, SumOf<Unit>* c,
                                             int64_t c_step) {
  const Unit* a2 = a + kTileRows * a_step;
  SumOf<Unit>* c2 = c + kTileRows * c_step;
  const int64_t a_bytes = a_step * sizeof(Unit), b_bytes = b_step * sizeof(Unit);
  const int64_t c_bytes = c_step * sizeof *c;
  // Tiles are named by constants.
#define LLMOS_TILE_BEGIN(to, at)    \
  do {                              \
    if constexpr (kAdd)             \
      _tile_loadd(to, at, c_bytes); \
    else                            \
      _tile_zero(to);               \
  } while (0)
#define LLMOS_TILE_MULTIPLY(to, left, right) \
  do {                                       \
    if constexpr (kIsInt<Unit>)              \
      _tile_dpbsud(to, left, right);         \
    else                                     \
      _tile_dpbf16ps(to, left, right);       \
  } while (0)
  LLMOS_TILE_BEGIN(0, c);
  if constexpr (kTwoVectors) LLMOS_TILE_BEGIN(1, c + kLanes);
  if constexpr (kTwoRows) LLMOS_TILE_BEGIN(2, c2);
  if constexpr (kTwoRows && kTwoVectors) LLMOS_TILE_BEGIN(3, c2 + kLanes);
  for (int64_t i = 0; i < k; i += kTileUnits, b += kTileUnits * b_step) {
    _tile_loadd(4, a + i, a_bytes);
    _tile_loadd(6, b, b_bytes);
    LLMOS_TILE_MULTIPLY(0, 4, 6);
    if constexpr (kTwoVectors) {
      _tile_loadd(7, b + kLanes, b_bytes);
      LLMOS_TILE_MULTIPLY(1, 4, 7);
    }
    if constexpr (kTwoRows) {
      _tile_loadd(5, a2 + i, a_bytes);
      LLMOS_TILE_MULTIPLY(2, 5, 6);
    }
    if constexpr (kTwoRows && kTwoVectors) LLMOS_TILE_MULTIPLY(3, 5, 7);
  }
#undef LLMOS_TILE_BEGIN
#undef LLMOS_TILE_MULTIPLY
  _tile_stored(0, c, c_bytes);
  if constexpr (kTwoVectors) _tile_stored(1, c + kLanes, c_bytes);
  if constexpr (kTwoRows) _tile_stored(2, c2, c_bytes);
  if constexpr (kTwoRows && kTwoVectors) _tile_stored(3, c2 + kLanes, c_bytes);
}

// `rows` are those of one or two tiles.
template <class Unit, Into kInto, bool kTwoRows>
[[gnu::noinline]] void tile_rows(int64_t rows, int64_t vectors, int64_t k, const Unit* a,
                                 int64_t a_step, const Unit* b, int64_t b_step, SumOf<Unit>* c,
                                 int64_t c_step, const float* alpha) {
  constexpr bool kAdd = kInto == Into::Add, kScale = kInto == Into::Scale;
  constexpr int64_t kStep = 2 * kLanes;
  alignas(64) SumOf<Unit> sums[kScale ? 2 * kTileRows * kStep : 1];
  tiles_fence();
  int64_t at = 0;
  const auto run = [&](auto two) {
    constexpr bool kTwo = decltype(two)::value;
    tile_step<Unit, kAdd, kTwoRows, kTwo>(a, a_step, b + at, b_step, k, kScale ? sums : c + at,
                                          kScale ? kStep : c_step);
    constexpr int64_t kWidth = kTwo ? kStep : kLanes;
    if constexpr (kScale) {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < kWidth; j += kLanes) {
          float* to = c + r * c_step + at + j;
          store(to, fma(load<F32>(to), F32{} + alpha[r], load<F32>(sums + r * kStep + j)));
        }
    }
    at += kWidth;
  };
  while (at + kStep <= vectors * kLanes) run(std::true_type{});
  if (at < vectors * kLanes) run(std::false_type{});
}

// Sums over k units: whole tiles, or one part of one. By columns at most kTurned.
constexpr int64_t kTurned = 64;
template <class Unit, bool kByColumn, Into kInto>
void tile_part(int64_t rows, int64_t vectors, int64_t k, const Unit* a, int64_t a_step,
               const Unit* b, int64_t b_step, SumOf<Unit>* c, int64_t c_step, const float* alpha) {
  constexpr int64_t kMost = 2 * kTileRows;
  alignas(64) Unit turned[kByColumn ? kMost * kTurned : 1];
  for (int64_t row = 0; row < rows; row += kMost) {
    const int64_t count = std::min(kMost, rows - row), first = std::min(kTileRows, count);
    const Unit* left = a + row * a_step;
    if constexpr (kByColumn) {
      turn_by_columns(count, k, a + row, a_step, turned, kTurned);
      left = turned;
    }
    const TileShapes shapes{uint8_t(first), uint8_t(count - first),
                            uint8_t(std::min(k, kTileUnits))};
    if (tile_shapes != shapes) set_tiles(shapes);
    const auto run =
        count > kTileRows ? &tile_rows<Unit, kInto, true> : &tile_rows<Unit, kInto, false>;
    run(count, vectors, k, left, kByColumn ? kTurned : a_step, b, b_step, c + row * c_step, c_step,
        kInto == Into::Scale ? alpha + row : nullptr);
  }
}

// As `product` of tiles.h says; k is not 0.
template <class Unit, bool kByColumn, Into kInto>
void tile_product(int64_t rows, int64_t vectors, int64_t k, const Unit* a, int64_t a_step,
                  const Unit* b, int64_t b_step, SumOf<Unit>* c, int64_t c_step,
                  const float* alpha) {
  auto run = &tile_part<Unit, kByColumn, kInto>;
  while (k > 0) {
    const int64_t whole = k / kTileUnits * kTileUnits;
    const int64_t n = !whole ? k : kByColumn ? std::min(whole, kTurned) : whole;
    run(rows, vectors, n, a, a_step, b, b_step, c, c_step, alpha);
    run = &tile_part<Unit, kByColumn, Into::Add>;
    a += n * (kByColumn ? a_step : 1);
    b += n * b_step;
    k -= n;
  }
}
#else
template <class Unit>
constexpr bool kInTiles = false;

struct [[maybe_unused]] TilesInUse {};
#endif

}  // namespace
}  // namespace llmos
