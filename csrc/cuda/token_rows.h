// Tokens [batch, frames, tokens, dim] seen as rows, and the tiles of tokens in which sums over rows are taken.
#pragma once

#include "inti/device.h"

namespace inti::cuda {

template <class T>
struct TokenRows {
  const T* x;  // [batch, frames, tokens, dim], strides
  Strides strides;
  const Wide<T>* position;  // [frames, dim], or null
  int frames, tokens, dim;

  __device__ __forceinline__ const T* at(unsigned clip, unsigned frame, unsigned token) const {
    return x + clip * strides.batch + frame * strides.frame + token * strides.token;
  }
};

// A row's frame, counted over all clips, and token.
struct RowPlace {
  unsigned frame, token;
  __device__ __forceinline__ RowPlace(unsigned row, unsigned tokens) : frame(row / tokens), token(row % tokens) {}
};

constexpr int kTileTokens = 32;  // at most

// How a frame's tokens are cut into tiles: `tiles` of `tile_tokens` each, but for the last.
struct TokenTiles {
  unsigned tiles, tile_tokens;
};

// A block's columns, and its tile: a run of rows of one frame.
struct TileOfTokens {
  unsigned tile, frame;  // over all frames of all clips
  unsigned columns;      // which columns
  int first, count;      // tokens
  // Blocks of the same tile are neighbours if they differ in columns.
  __device__ __forceinline__ TileOfTokens(const TokenTiles& cut, unsigned tokens, unsigned column_tiles) {
    tile = blockIdx.x / column_tiles;
    columns = blockIdx.x - tile * column_tiles;
    frame = tile / cut.tiles;
    first = (tile - frame * cut.tiles) * cut.tile_tokens;
    const int left = static_cast<int>(tokens) - first;
    count = left < static_cast<int>(cut.tile_tokens) ? left : cut.tile_tokens;
  }
};

#ifndef __CUDACC_RTC__

// How `frames` frames' tokens are cut for blocks of `across` times 256 columns: into tiles of 32 tokens, or fewer where
// that would leave some of V100's 80 multiprocessors without two blocks, down to 8, below which the partial sums would
// weigh too much. Depends on the sizes only, so that the bits do too.
inline TokenTiles token_tiles(int64_t frames, int64_t tokens, int64_t across = 1) {
  if (frames == 0 || tokens == 0 || across == 0) return {1, 1};
  const int64_t wanted = (tokens + kTileTokens - 1) / kTileTokens, most = (tokens + 7) / 8;
  const int64_t least = (160 + frames * across - 1) / (frames * across);
  const int64_t tiles = wanted > least ? wanted : least < most ? least : most;
  const int64_t tile_tokens = (tokens + tiles - 1) / tiles;
  return {static_cast<unsigned>((tokens + tile_tokens - 1) / tile_tokens), static_cast<unsigned>(tile_tokens)};
}

// A size that the kernels count in 32 bits, with room for a tile beyond it.
inline int counted(int64_t size, const char* what) {
  if (size >= int64_t{1} << 30) {
    throw std::invalid_argument(std::string("inti_kernels: ") + what + " must be below 2^30, got " +
                                std::to_string(size) + "; split the batch");
  }
  return static_cast<int>(size);
}

#endif  // __CUDACC_RTC__

}  // namespace inti::cuda
