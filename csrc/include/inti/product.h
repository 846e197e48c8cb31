// Matrix products in float32, for processors on which PyTorch's are slow: AMD's with AVX2 and no more. With AVX-512
// they are as fast as PyTorch's, and a forward's are taken for what stands around them. The baseline's are there for
// tests.
#pragma once

#include <cstdint>

namespace inti {

// c = a·b, or c += a·b. No size is 0.
struct Product {
  int64_t rows, columns, depth;
  const float* a;  // [rows, depth], a_strides
  int64_t a_strides[2];
  const float* b;  // [depth, columns], b_strides
  int64_t b_strides[2];
  float* c;  // [rows, columns], columns contiguous
  int64_t c_pitch;
  bool accumulate;   // c is added to, not written
  float* workspace;  // gemm_workspace(columns, min(depth, kProductDepth), threads) numbers
  int threads;
};

// A longer product is a sum of products: else a block of rows that stays in the second cache would have too few of
// them. The result is read and written again for each, which makes two of 800 terms 6 % slower than one of 1600.
constexpr int64_t kProductDepth = 1600;

// A thread packs as many rows of the first operand at once as make about this many numbers: half of the second cache,
// where that has 512 KB.
constexpr int64_t kPackedNumbers = 1 << 16;

// In every instruction set tiles have at most these rows, and columns that divide these.
constexpr int64_t kTileRowsAtMost = 14, kColumnsOfTiles = 32;

// What a thread has for itself: the rows that it packs, and those of a tile before they are packed.
inline int64_t gemm_block(int64_t depth) { return kPackedNumbers + 2 * kTileRowsAtMost * depth; }

inline int64_t gemm_workspace(int64_t columns, int64_t depth, int threads) {
  const int64_t tiles = (columns + kColumnsOfTiles - 1) / kColumnsOfTiles;
  return tiles * kColumnsOfTiles * depth + threads * gemm_block(depth);
}

}  // namespace inti
