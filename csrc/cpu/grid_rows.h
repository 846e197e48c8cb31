// Rows of the grid, staged: in wide numbers, with σP and the zeros around the grid, a block of channels at a time.
#pragma once

#include "inti/depthwise_conv3d.h"
#include "vec.h"

namespace inti::INTI_ISA {
namespace {

// Columns of a staged row. Wider grids are cut into tiles, so that a few rows fit the stack and the L1 or L2 cache,
// whatever the grid.
constexpr int kColumns = 32;

// 256 bytes of channels: whole cache lines, and few enough that what is worked on stays in L1, or most of it in one of
// 32 KB: of a 16-wide grid three staged rows, three output rows and the weights, 32 KB together.
template <class A>
constexpr int kChannels = 256 / int(sizeof(A));

template <class A>
struct alignas(64) Row {
  A at[kColumns][kChannels<A>];
};

// Tokens [batch, frames, prefix + height·width, dim] that rows are staged from.
struct Source {
  const void* data;
  Strides strides;
  const void* position;  // wide [frames, dim], or null
  int64_t prefix, height, width, dim;

  Source(const DepthwiseConv3dShape& shape, const void* data, const Strides& strides, const void* position)
      : data(data),
        strides(strides),
        position(position),
        prefix(shape.prefix),
        height(shape.height),
        width(shape.width),
        dim(shape.dim) {}
};

struct Tile {
  int64_t channel, column;  // the first ones
  int channels, columns;
};

// One token's channels: a whole block, or the `rest` that the last block has, with zeros behind them.
template <bool kWhole, class T, class A>
INTI_INLINE void stage_token(const T* token, const A* position, int rest, A* to) {
  constexpr int lanes = kLanes<A>;
#pragma GCC unroll 8
  for (int c = 0; c < kChannels<A>; c += lanes, rest -= lanes) {
    Vec<A> v{};
    if (kWhole || rest >= lanes) {
      v = load(token + c);
      if (position) v += load(position + c);
    } else if (rest > 0) {
      v = load_first(token + c, rest);
      if (position) v += load_first(position + c, rest);
    }
    store(to + c, v);
  }
}

template <bool kWhole, class T, class A>
INTI_INLINE void stage_tokens(const T* token, int64_t pitch, int count, int64_t ahead, const A* position, int channels,
                              A (*to)[kChannels<A>]) {
  for (int i = 0; i < count; ++i, token += pitch) {
    // A block of channels is too short a run for the processor to see what comes: the same token of the next row.
    for (int c = 0; c < (kWhole ? kChannels<A> : channels); c += 64 / int(sizeof(T)))
      __builtin_prefetch(token + ahead + c);
    stage_token<kWhole>(token, position, channels, to[i]);
  }
}

// Stages columns [tile.column − halo, tile.column + tile.columns + halo) of a row; what is outside the grid is 0.
template <class T, class A>
void stage_row(const Source& source, int64_t batch, int64_t frame, int64_t r, const Tile& tile, int halo, Row<A>& row) {
  const A* position =
      source.position ? static_cast<const A*>(source.position) + frame * source.dim + tile.channel : nullptr;
  const T* tokens = static_cast<const T*>(source.data) + batch * source.strides.batch + frame * source.strides.frame +
                    (source.prefix + r * source.width) * source.strides.token + tile.channel;
  const int all = tile.columns + 2 * halo;
  const bool is_inside = r >= 0 && r < source.height;
  const int64_t before = halo - tile.column, behind = source.width + halo - tile.column;
  const int begin = is_inside ? int(before > 0 ? before : 0) : all, end = is_inside && behind < all ? int(behind) : all;
  for (int i = 0; i < all; ++i)
    if (i < begin || i >= end)
      for (int c = 0; c < kChannels<A>; ++c) row.at[i][c] = 0;
  const T* first = tokens + (tile.column + begin - halo) * source.strides.token;
  const int64_t pitch = source.strides.token, ahead = r + 1 < source.height ? source.width * pitch : 0;
  if (tile.channels == kChannels<A>)
    stage_tokens<true>(first, pitch, end - begin, ahead, position, tile.channels, row.at + begin);
  else
    stage_tokens<false>(first, pitch, end - begin, ahead, position, tile.channels, row.at + begin);
}

INTI_INLINE Tile channel_tile(int64_t dim, int64_t block, int channels) {
  const int64_t channel = block * channels;
  return {channel, 0, int(dim - channel < channels ? dim - channel : channels), 0};
}

}  // namespace
}  // namespace inti::INTI_ISA
