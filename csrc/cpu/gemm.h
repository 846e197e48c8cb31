// Matrix products in float32. Both operands are packed, so that the innermost loop reads them along one line each while
// a tile of the result stays in registers: the columns' numbers from the first cache, where they wait for tile after
// tile of rows, the rows' from the second. What is done to the rows before and to the result after is the caller's: it
// happens in these caches, and is no pass over memory of its own.
#pragma once

#include "inti/product.h"
#include "rows.h"

namespace inti::INTI_ISA {
namespace {

// The sums of a tile, a vector of columns for each of kTileVectors and what that is multiplied by fill the registers:
// 32 with AVX-512, 16 else (and without FMA a product needs one of its own).
#if defined(__AVX512F__)
constexpr int kTileRows = 14;
#elif defined(__AVX2__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kTileVectors = 2;
constexpr int kTileColumns = kTileVectors * kLanes<float>;

// Terms that are added up in one go: as many of a panel of columns as fill half of a first cache of 32 KB, or with
// AVX-512 two thirds of one of 48 KB; and sums of sums lose less than one long sum. Of the cuts in here the only one
// that the bits of a result depend on.
constexpr int64_t kTerms = (kVectorBytes == 64 ? 8192 : 4096) / kTileColumns;

// Rows of a block, where they are short.
constexpr int64_t kRowsAtMost = 168;
static_assert(kTileRows <= kTileRowsAtMost && kRowsAtMost >= kTileRows && kColumnsOfTiles % kTileColumns == 0,
              "fits the workspace");

// Numbers of a cache line; and calls of multiply_terms that share the fetching of the next part of a panel.
constexpr int kLine = 16, kFetchers = 4;

// tile [kTileRows, kTileColumns] = or += a [terms, kTileRows]ᵀ · b [terms, kTileColumns]; and of what is multiplied
// next, a share of a kFetchers-th from `ahead` on comes into the second cache. No processor does that by itself: a
// panel's parts are too short.
static __attribute__((noinline)) void multiply_terms(const float* a, const float* b, int64_t terms, bool add,
                                                     float* tile, const float* ahead) {
  Vec<float> sums[kTileRows][kTileVectors] = {};
  const auto add_term = [&]() __attribute__((always_inline)) {
    Vec<float> row[kTileVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) row[v] = load(b + v * kLanes<float>);
#pragma GCC unroll 14
    for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) sums[i][v] += a[i] * row[v];
    a += kTileRows;
    b += kTileColumns;
  };
  int64_t k = 0;
  for (; k + kFetchers <= terms; k += kFetchers, ahead += kTileColumns) {
#pragma GCC unroll 2
    for (int line = 0; line < kTileColumns; line += kLine) __builtin_prefetch(ahead + line, 0, 2);
#pragma GCC unroll 4
    for (int i = 0; i < kFetchers; ++i) add_term();
  }
  for (; k < terms; ++k) add_term();
#pragma GCC unroll 14
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) {
      float* to = tile + i * kTileColumns + v * kLanes<float>;
      store(to, add ? load(to) + sums[i][v] : sums[i][v]);
    }
}

// --- Packing ---------------------------------------------------------------------------------------------------------

typedef float Quad __attribute__((vector_size(16)));

INTI_INLINE Quad load_quad(const float* p) {
  Quad v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

// The first two numbers of each, in turns; and the last two.
#if defined(__clang__)
INTI_INLINE Quad low_halves(Quad a, Quad b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
INTI_INLINE Quad high_halves(Quad a, Quad b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#else
typedef int32_t Places __attribute__((vector_size(16)));
INTI_INLINE Quad low_halves(Quad a, Quad b) { return __builtin_shuffle(a, b, Places{0, 4, 1, 5}); }
INTI_INLINE Quad high_halves(Quad a, Quad b) { return __builtin_shuffle(a, b, Places{2, 6, 3, 7}); }
#endif

// Four numbers each of four lines, `line` apart: number k of all four goes to to + k · width.
INTI_INLINE void transpose_four(const float* from, int64_t line, float* to, int width) {
  const Quad a = load_quad(from), b = load_quad(from + line), c = load_quad(from + 2 * line),
             d = load_quad(from + 3 * line);
  const Quad ac0 = low_halves(a, c), bd0 = low_halves(b, d), ac1 = high_halves(a, c), bd1 = high_halves(b, d);
  const Quad columns[4] = {low_halves(ac0, bd0), high_halves(ac0, bd0), low_halves(ac1, bd1), high_halves(ac1, bd1)};
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) __builtin_memcpy(to + k * width, &columns[k], sizeof(Quad));
}

// Likewise of two lines.
INTI_INLINE void transpose_two(const float* from, int64_t line, float* to, int width) {
  const Quad a = load_quad(from), b = load_quad(from + line);
  const Quad columns[2] = {low_halves(a, b), high_halves(a, b)};
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k)
    __builtin_memcpy(to + k * width, reinterpret_cast<const float*>(columns) + 2 * k, 2 * sizeof(float));
}

// Lines of numbers, `line` apart from line to line and `along` within one.
struct Lines {
  const float* data;
  int64_t line, along, count, depth;
};

// `Width` lines from `first` on, as [depth, Width]; zeros for lines that are missing.
template <int Width>
INTI_INLINE void pack_panel(const Lines& from, int64_t first, float* to) {
  const float* data = from.data + first * from.line;
  const bool whole = first + Width <= from.count;
  int64_t k = 0;
  if (whole && from.line == 1) {
    for (; k < from.depth; ++k) __builtin_memcpy(to + k * Width, data + k * from.along, sizeof(float) * Width);
  } else if (whole && from.along == 1) {
    for (; k + 4 <= from.depth; k += 4) {
      int i = 0;
#pragma GCC unroll 8
      for (; i + 4 <= Width; i += 4) transpose_four(data + i * from.line + k, from.line, to + k * Width + i, Width);
      if constexpr (Width % 4 == 2) transpose_two(data + i * from.line + k, from.line, to + k * Width + i, Width);
    }
  }
  for (; k < from.depth; ++k)
    for (int i = 0; i < Width; ++i)
      to[k * Width + i] = first + i < from.count ? data[k * from.along + i * from.line] : 0;
}

// --- The product -----------------------------------------------------------------------------------------------------

// Multiplies rows by a matrix whose columns are the lines of b.
//   pack(row, to, scratch): writes kTileRows rows as pack_panel does; scratch has kTileRows · depth numbers
//   finish(row, column, count, sums, own): takes `count` numbers of a row of the result, the columns of a row in order
//       and in one thread; `own` has kLanes<float> numbers for each row, 64-byte aligned, to be kept from column to
//       column
//   end(row, own): a row is complete
template <class Pack, class Finish, class End>
INTI_INLINE void gemm(const Lines& b, int64_t rows, int threads, float* workspace, const Pack& pack,
                      const Finish& finish, const End& end) {
  const int64_t depth = b.depth, columns = parts_of(b.count, kTileColumns) * kTileColumns;
  parallel_for(columns / kTileColumns, threads, [&](int64_t panel) {
    pack_panel<kTileColumns>(b, panel * kTileColumns, workspace + panel * kTileColumns * depth);
  });
  const int64_t tiles = parts_of(rows, kTileRows);
  const int64_t most = least(kPackedNumbers / (kTileRows * depth) + 1, kRowsAtMost / kTileRows);
  const int64_t terms = parts_of(depth, parts_of(depth, kTerms));
  // As many blocks for every thread.
  const int64_t blocks = least(tiles, parts_of(parts_of(tiles, most), threads) * threads);
  parallel_for(blocks, threads, [&](int64_t block) {
    float* const scratch = workspace + columns * depth + thread_number() * gemm_block(depth);
    float* const packed = scratch + kTileRows * depth;
    alignas(64) float own[kRowsAtMost][kLanes<float>];
    alignas(64) float sums[kRowsAtMost][kTileColumns];
    const int64_t first = tiles * block / blocks * kTileRows;
    const int64_t last = least(tiles * (block + 1) / blocks * kTileRows, rows);
    for (int64_t row = first; row < last; row += kTileRows) pack(row, packed + (row - first) * depth, scratch);
    for (int64_t column = 0; column < columns; column += kTileColumns)
      for (int64_t k = 0; k < depth; k += terms) {
        const int64_t now = least(terms, depth - k);
        const float* const part = workspace + column * depth + k * kTileColumns;
        for (int64_t row = first; row < last; row += kTileRows) {
          const int64_t share = (row - first) / kTileRows % kFetchers;
          float* const tile = sums[row - first];
          multiply_terms(packed + (row - first) * depth + k * kTileRows, part, now, k > 0, tile,
                         part + now * kTileColumns + share * (now / kFetchers) * kTileColumns);
          if (k + now < depth) continue;
          for (int64_t i = 0; i < least(kTileRows, last - row); ++i)
            finish(row + i, column, least(kTileColumns, b.count - column), sums[row + i - first], own[row + i - first]);
        }
      }
    for (int64_t row = first; row < last; ++row) end(row, own[row - first]);
  });
}

}  // namespace
}  // namespace inti::INTI_ISA
