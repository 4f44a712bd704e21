// Micro-kernels for AMX, whose tiles hold 16 rows of 16 words or sums.
#pragma once

#include "vnni_layout.h"

namespace llmos {
namespace {

#if defined(__AMX_TILE__)
template <class Word>
constexpr bool kUsesAmx = kPerWord<Word> > 1;

constexpr int64_t kTileRows = 16, kTileWords = 16;
static_assert(kLanes == 16);

// The tile configuration for a block of up to 32 rows and two vectors of c. Tiles 0 to 3 hold its
// sums, row by row; 4 and 5 the left operand, 6 and 7 the right operand. A tile may be smaller than
// 16 x 16.
struct AmxTileShapes {
  uint8_t first_rows = 0, second_rows = 0, words = 0;

  bool operator==(const AmxTileShapes&) const = default;
};

// The current tile configuration of this thread; all zero if there is none.
thread_local AmxTileShapes amx_tile_shapes;

// Tell the compiler that AMX instructions read and write memory.
[[gnu::always_inline]] inline void amx_fence() { asm volatile("" ::: "memory"); }

[[gnu::noinline]] inline void configure_amx_tiles(const AmxTileShapes& shapes) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};  // Bytes of a row, for each tile.
    uint8_t rows[16] = {};
  } config;
  const auto [first, second, words] = shapes;
  const uint8_t rows[8] = {first, first, second, second, first, second, words, words};
  for (int i = 0; i < 8; ++i) {
    const bool left = i == 4 || i == 5;
    config.rows[i] = rows[i];
    config.bytes[i] = rows[i] ? 4 * (left ? words : kLanes) : 0;
  }
  amx_fence();
  _tile_loadconfig(&config);
  amx_tile_shapes = shapes;
}

// Releases the tiles of this thread when its tasks are done.
struct AmxScope {
  ~AmxScope() {
    if (amx_tile_shapes == AmxTileShapes{}) return;
    _tile_release();
    amx_tile_shapes = {};
  }
};

// The micro-kernel: a block of one or two tiles of rows, and one or two vectors, over k words. k is
// a multiple of kTileWords, or less than it.
template <class Word, bool kAdd, bool kTwoRows, bool kTwoVectors>
[[gnu::always_inline]] inline void amx_microkernel(const Word* a, int64_t a_step, const Word* b,
                                                   int64_t b_step, int64_t k,
                                                   AccumulatorOf<Word>* c, int64_t c_step) {
  const Word* a2 = a + kTileRows * a_step;
  AccumulatorOf<Word>* c2 = c + kTileRows * c_step;
  const int64_t a_bytes = a_step * sizeof(Word), b_bytes = b_step * sizeof(Word);
  const int64_t c_bytes = c_step * sizeof *c;
  // These are macros because tile numbers must be literals.
#define LLMOS_TILE_BEGIN(to, at)    \
  do {                              \
    if constexpr (kAdd)             \
      _tile_loadd(to, at, c_bytes); \
    else                            \
      _tile_zero(to);               \
  } while (0)
#define LLMOS_TILE_MULTIPLY(to, left, right) \
  do {                                       \
    if constexpr (kIsInt<Word>)              \
      _tile_dpbsud(to, left, right);         \
    else                                     \
      _tile_dpbf16ps(to, left, right);       \
  } while (0)
  LLMOS_TILE_BEGIN(0, c);
  if constexpr (kTwoVectors) LLMOS_TILE_BEGIN(1, c + kLanes);
  if constexpr (kTwoRows) LLMOS_TILE_BEGIN(2, c2);
  if constexpr (kTwoRows && kTwoVectors) LLMOS_TILE_BEGIN(3, c2 + kLanes);
  for (int64_t i = 0; i < k; i += kTileWords, b += kTileWords * b_step) {
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

// One or two tiles of rows, and all vectors.
template <class Word, Update kUpdate, bool kTwoRows>
[[gnu::noinline]] void amx_row_block(int64_t rows, int64_t vectors, int64_t k, const Word* a,
                                     int64_t a_step, const Word* b, int64_t b_step,
                                     AccumulatorOf<Word>* c, int64_t c_step, const float* alpha) {
  constexpr bool kAdd = kUpdate == Update::Add, kScale = kUpdate == Update::ScaleAdd;
  constexpr int64_t kStep = 2 * kLanes;
  alignas(64) AccumulatorOf<Word> sums[kScale ? 2 * kTileRows * kStep : 1];
  amx_fence();
  int64_t at = 0;
  const auto run = [&](auto two) {
    constexpr bool kTwo = decltype(two)::value;
    amx_microkernel<Word, kAdd, kTwoRows, kTwo>(a, a_step, b + at, b_step, k,
                                                kScale ? sums : c + at, kScale ? kStep : c_step);
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

// All rows over k words, where k is a multiple of kTileWords or less than it, and at most
// kMaxTransposedWords with kByColumn.
constexpr int64_t kMaxTransposedWords = 64;
template <class Word, bool kByColumn, Update kUpdate>
void amx_gemm_part(int64_t rows, int64_t vectors, int64_t k, const Word* a, int64_t a_step,
                   const Word* b, int64_t b_step, AccumulatorOf<Word>* c, int64_t c_step,
                   const float* alpha) {
  constexpr int64_t kMaxRows = 2 * kTileRows;
  alignas(64) Word transposed[kByColumn ? kMaxRows * kMaxTransposedWords : 1];
  for (int64_t row = 0; row < rows; row += kMaxRows) {
    const int64_t count = std::min(kMaxRows, rows - row), first = std::min(kTileRows, count);
    const Word* left = a + row * a_step;
    if constexpr (kByColumn) {
      transpose_words(count, k, a + row, a_step, transposed, kMaxTransposedWords);
      left = transposed;
    }
    const AmxTileShapes shapes{uint8_t(first), uint8_t(count - first),
                               uint8_t(std::min(k, kTileWords))};
    if (amx_tile_shapes != shapes) configure_amx_tiles(shapes);
    const auto run = count > kTileRows ? &amx_row_block<Word, kUpdate, true>
                                       : &amx_row_block<Word, kUpdate, false>;
    run(count, vectors, k, left, kByColumn ? kMaxTransposedWords : a_step, b, b_step,
        c + row * c_step, c_step, kUpdate == Update::ScaleAdd ? alpha + row : nullptr);
  }
}

// Do what small_gemm in microkernel.h does, for k > 0.
template <class Word, bool kByColumn, Update kUpdate>
void amx_gemm(int64_t rows, int64_t vectors, int64_t k, const Word* a, int64_t a_step,
              const Word* b, int64_t b_step, AccumulatorOf<Word>* c, int64_t c_step,
              const float* alpha) {
  auto run = &amx_gemm_part<Word, kByColumn, kUpdate>;
  while (k > 0) {
    const int64_t whole = k / kTileWords * kTileWords;
    const int64_t n = !whole ? k : kByColumn ? std::min(whole, kMaxTransposedWords) : whole;
    run(rows, vectors, n, a, a_step, b, b_step, c, c_step, alpha);
    run = &amx_gemm_part<Word, kByColumn, Update::Add>;
    a += n * (kByColumn ? a_step : 1);
    b += n * b_step;
    k -= n;
  }
}
#else
template <class Word>
constexpr bool kUsesAmx = false;

struct [[maybe_unused]] AmxScope {};
#endif

}  // namespace
}  // namespace llmos
