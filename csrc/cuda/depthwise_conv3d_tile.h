// What depthwise_conv3d's kernels share: how the work is cut, and how a frame's tile comes into shared memory.
//
// A block has a slab of channels, 32 bytes wide (one sector), of a tile of patches, and walks along a run of frames.
// Eight threads share the slab's channels; each has a strip of P patches of a row. A frame's tile lies in shared memory
// with its halo, in two buffers: while the threads compute on one frame, the next one's loads are under way.
#pragma once

#include "inti/device.h"

namespace inti::cuda {

constexpr int kLanes = 8;                // threads across a slab's channels
constexpr int kMostStrips = 32;          // of a tile: 256 threads
constexpr int kMostAcross = 6;           // strips side by side, which leaves room for kLeastRows
constexpr int kLeastRows = 5;            // of a tile, or all rows: with fewer most of what is loaded would be halo
constexpr int kConvolutionBlocks = 160;  // two for each of V100's 80 multiprocessors

template <class T>
constexpr int kChannelsPerThread = sizeof(T) == 2 ? 2 : 1;
template <class T>
constexpr int kSlab = kLanes * kChannelsPerThread<T>;

// How patches, channels and frames are shared out; the same for all threads of a launch.
struct Tiling {
  int rows, strips;   // of a tile: rows high, strips of P patches side by side
  int across, tiles;  // tiles side by side, and of a whole frame
  int slabs;
  int run, runs;  // output frames of a block, and blocks along the frames
  int threads;
};

// Tokens as kernels read them; `first` is the first patch of the clip's frame 0.
template <class T>
struct Frames {
  const T* first;
  int64_t frame, token;  // strides
};

// A block's share of the work, and a thread's place in it.
template <class T, int P>
struct Place {
  int height, width;
  int top, left;    // the tile's first patch
  int channel;      // the slab's first
  int lane, strip;  // of this thread
  int row, column;  // of its strip inside the tile; column in patches
  int first, last;  // output frames of the run
  int tile;
  int64_t clip, part;  // part: (clip, run, tile) in one number
  bool live;           // it has a strip

  __device__ Place(const Tiling& tiling, int height, int width, int out_frames) : height(height), width(width) {
    unsigned rest = blockIdx.x;
    const unsigned slabs = tiling.slabs, tiles = tiling.tiles, runs = tiling.runs;
    channel = static_cast<int>(rest % slabs) * kSlab<T>;
    rest /= slabs;
    part = rest;
    tile = static_cast<int>(rest % tiles);
    rest /= tiles;
    first = static_cast<int>(rest % runs) * tiling.run;
    last = first + tiling.run < out_frames ? first + tiling.run : out_frames;
    clip = rest / runs;
    top = tile / tiling.across * tiling.rows;
    left = tile % tiling.across * tiling.strips * P;
    lane = threadIdx.x % kLanes;
    strip = threadIdx.x / kLanes;
    // Rows first: the four strips of a warp are rows below each other, an odd pitch apart, in different banks.
    row = strip % tiling.rows;
    column = strip / tiling.rows * P;
    live = strip < tiling.rows * tiling.strips;
  }
  // Whether patch p of the strip is on the grid.
  __device__ bool inside(int p) const { return live && top + row < height && left + column + p < width; }
  __device__ int64_t patch(int p) const { return static_cast<int64_t>(top + row) * width + left + column + p; }
};

// Patches from row to row of a tile in shared memory: odd, so that the rows that a warp reads lie in different banks.
template <int P, int SPACE>
__device__ __host__ constexpr int tile_pitch(int strips) {
  return (strips * P + SPACE - 1) | 1;
}

// Brings the patches of one frame into shared memory, [rows + SPACE - 1, pitch, kSlab]; what lies outside the grid
// stays as clear() leaves it, zero. With V of 16 bytes a thread has at most kItems of them, which it fetches into
// registers before it computes, and puts down after; single elements go straight through.
template <class T, int V, int P, int SPACE>
struct Stager {
  static constexpr int kVectors = kSlab<T> / V;
  // A thread never has more: a tile's (rows + 2)·(8·strips + 2) patches of kVectors each over 8·rows·strips threads,
  // with five rows or more and four strips or more, or without a halo on the sides where the grid ends.
  static constexpr int kItems = V == 1 ? 1 : kVectors * 3 / 2;

  Frames<T> frames;
  const Wide<T>* position;             // of frame 0, at the slab's first channel; or null
  int64_t position_step;               // from frame to frame
  int top, left, rows, columns;        // what is loaded: the tile and its halo, on the grid
  int width, corner, pitch;            // corner: place of (top, left) in a buffer, in patches
  int channels;                        // of the slab that exist
  int source[kItems], target[kItems];  // of a thread's vectors: patch of the grid, or -1; place in a buffer
  Vec<T, V> held[kItems];

  __device__ Stager(const Place<T, P>& place, const Tiling& tiling, Frames<T> frames, const Wide<T>* position,
                    int64_t dim)
      : frames(frames), position(position), position_step(dim), width(place.width) {
    constexpr int halo = SPACE / 2;
    pitch = tile_pitch<P, SPACE>(tiling.strips);
    top = place.top - halo > 0 ? place.top - halo : 0;
    left = place.left - halo > 0 ? place.left - halo : 0;
    const int below = place.top + tiling.rows + halo, behind = place.left + tiling.strips * P + halo;
    rows = (below < place.height ? below : place.height) - top;
    columns = (behind < width ? behind : width) - left;
    corner = (top - place.top + halo) * pitch + left - place.left + halo;
    channels = dim - place.channel < kSlab<T> ? static_cast<int>(dim - place.channel) : kSlab<T>;
    this->frames.first += place.channel;
    if (position) this->position += place.channel;
    if constexpr (V > 1) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) find(threadIdx.x + i * blockDim.x, source[i], target[i]);
    }
  }
  __device__ static void clear(Shared<T> buffers, int elements) {
    for (int i = threadIdx.x; i < elements; i += blockDim.x) store(buffers + i, T{});
  }
  // Vectors are numbered along the slab's channels, then the patches that are loaded.
  __device__ int items() const { return rows * columns * kVectors; }
  __device__ void find(int item, int& from, int& to) const {
    const int patch = item / kVectors, row = patch / columns, column = patch - row * columns;
    const int channel = item % kVectors * V;
    from = item < items() && channel < channels ? (top + row) * width + left + column : -1;
    to = (corner + row * pitch + column) * kSlab<T> + channel;
  }
  // Threads are a multiple of kVectors, so all vectors of a thread are of the same channels.
  __device__ int channel() const { return threadIdx.x % kVectors * V; }

  __device__ Vec<T, V> with_position(const Vec<T, V>& value, int frame) const {
    if (!position) return value;
    constexpr int step = V * sizeof(Wide<T>) > 16 ? 16 / sizeof(Wide<T>) : V;
    const Wide<T>* row = position + frame * position_step + channel();
    Vec<Wide<T>, V> sum = widen(value);
#pragma unroll
    for (int i = 0; i < V; i += step) {
      const auto added = load<step>(row + i);
#pragma unroll
      for (int k = 0; k < step; ++k) sum[i + k] += added[k];
    }
    return narrow<T>(sum);
  }

  __device__ void fetch(int frame) {
    if constexpr (V > 1) {
      const T* from = frames.first + frame * frames.frame + channel();
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        if (source[i] >= 0) held[i] = load<V>(from + source[i] * frames.token);
    }
  }
  __device__ void put(Shared<T> buffer, int frame) const {
    if constexpr (V > 1) {
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        if (source[i] >= 0) store(buffer + target[i], with_position(held[i], frame));
    } else {
      const T* first = frames.first + frame * frames.frame + channel();
      for (int item = threadIdx.x; item < items(); item += blockDim.x) {
        int from, to;
        find(item, from, to);
        if (from >= 0) store(buffer + to, with_position(load<V>(first + from * frames.token), frame));
      }
    }
  }
};

// Calls body(frame, buffer) for each frame of [begin, end) in order, the frame's tile lying in `buffer`.
// `size`: elements of a buffer, of which there are two.
template <class S, class T, class Body>
__device__ __forceinline__ void walk(S& stager, Shared<T> buffers, int size, int begin, int end, Body body) {
  S::clear(buffers, 2 * size);
  stager.fetch(begin);
  __syncthreads();
  stager.put(buffers, begin);
  __syncthreads();
  for (int frame = begin, turn = 0; frame < end; ++frame, turn ^= 1) {
    if (frame + 1 < end) stager.fetch(frame + 1);
    body(frame, buffers + turn * size);
    // The other buffer was last read before the barrier that ended the step before.
    if (frame + 1 < end) stager.put(buffers + (turn ^ 1) * size, frame + 1);
    __syncthreads();
  }
}

// The strip's patches and what lies beside them, of row `row` of a tile: [P + SPACE - 1][channels of the thread].
template <class T, int P, int SPACE>
struct Row {
  static constexpr int C = kChannelsPerThread<T>;
  Wide<T> at[P + SPACE - 1][C];
  __device__ Row(Shared<T> row) {
#pragma unroll
    for (int p = 0; p < P + SPACE - 1; ++p) {
      const auto values = widen(load<C>(row + p * kSlab<T>));
#pragma unroll
      for (int c = 0; c < C; ++c) at[p][c] = values[c];
    }
  }
};

#ifndef __CUDACC_RTC__

// Patches of a strip: 7 where that wastes fewer threads on the grid's width than 8, for 16-bit 3×3×3.
inline int strip_patches(int64_t width, bool seven_built) {
  const int64_t of_seven = (width + 6) / 7 * 7, of_eight = (width + 7) / 8 * 8;
  return seven_built && of_seven < of_eight ? 7 : 8;
}

inline int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// The run is as long as leaves kConvolutionBlocks blocks: frames at its ends are read twice.
inline Tiling tile_frames(int64_t batch, int64_t height, int64_t width, int64_t dim, int64_t out_frames, int slab,
                          int patches) {
  Tiling tiling{};
  const int strips = divide_up(width, patches);
  tiling.across = divide_up(strips, kMostAcross);
  tiling.strips = divide_up(strips, tiling.across);
  const int down = divide_up(height, kMostStrips / tiling.strips);
  const int even = divide_up(height, down);
  tiling.rows = even >= kLeastRows || even == height ? even
                : height < kLeastRows                ? static_cast<int>(height)
                                                     : kLeastRows;
  tiling.tiles = tiling.across * divide_up(height, tiling.rows);
  tiling.slabs = divide_up(dim, slab);
  const int64_t blocks = batch * tiling.slabs * tiling.tiles;
  const int wanted = blocks ? divide_up(kConvolutionBlocks, blocks) : 1;
  tiling.run = divide_up(out_frames, wanted < out_frames ? wanted : out_frames);
  tiling.runs = divide_up(out_frames, tiling.run);
  tiling.threads = (tiling.rows * tiling.strips * kLanes + 31) / 32 * 32;
  return tiling;
}

#endif  // __CUDACC_RTC__

}  // namespace inti::cuda
