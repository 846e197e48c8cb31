// What depthwise_conv3d's kernels share: how the work is cut, and how a frame's tile comes into shared memory.
//
// A block has a slab of channels, 32 bytes wide (one sector), of a tile of patches, and walks along a run of frames.
// Eight threads share the slab's channels; each has a strip of P patches of a row. A frame's tile lies in shared memory
// with its halo, in two buffers: while the threads compute on one frame, the next one's loads are under way.
#pragma once

#include "inti/device.h"
#include "vectors.h"

namespace inti::cuda {

constexpr int kLanes = 8;                // threads across a slab's channels
constexpr int kLeastRows = 5;            // of a tile, or all rows: with fewer most of what is loaded would be halo
constexpr int kConvolutionBlocks = 160;  // two for each of V100's 80 multiprocessors

template <class T>
constexpr int kChannelsPerThread = sizeof(T) == 2 ? 2 : 1;
template <class T>
constexpr int kSlab = kLanes * kChannelsPerThread<T>;
// Strips of a tile: 256 threads; 128 in float64, whose tiles take twice the shared memory.
template <class T>
constexpr int kMostStrips = sizeof(T) == 8 ? 16 : 32;
// Strips side by side, which leaves room for kLeastRows.
template <class T>
constexpr int kMostAcross = kMostStrips<T> / kLeastRows;

// 256 threads, 2 blocks an SM (128 registers; float64, for gradient checks, and unaligned rows take what they need): 16
// warps, whose next frame's 16-byte loads, two or three a thread, are under way while they compute: 12 KiB and more.
template <class T, int V>
constexpr int kBlocks = sizeof(T) == 8 || V == 1 ? 1 : 2;

// How patches, channels and frames are shared out; the same for all threads of a launch.
struct Tiling {
  int rows, strips;   // of a tile: rows high, strips of P patches side by side
  int across, tiles;  // tiles side by side, and of a whole frame
  int slabs;
  int run, runs;  // output frames of a block, and blocks along the frames
  int threads;
};

// Of every kernel; `tiling` is of the frames that it walks along.
struct ConvolutionSizes {
  int frames, height, width, prefix;
  int64_t dim;
  Tiling tiling;
};

// Tokens as kernels read them: the first patch of the clip's frame 0 is at base + start. (What is the same for all
// threads of a launch takes no register; `start` ends in the threads' offsets.)
template <class T>
struct Frames {
  const T* base;
  int64_t start;
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
  unsigned clip, part;  // part: (clip, run, tile) in one number
  unsigned mask;        // bit p: patch p of the thread's strip is on the grid

  __device__ __forceinline__ Place(const Tiling& tiling, int height, int width, int out_frames)
      : height(height), width(width) {
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
    const bool live = strip < tiling.rows * tiling.strips;
    const int there = width - left - column;
    mask = !live || top + row >= height || there <= 0 ? 0 : there < P ? (1u << there) - 1 : (1u << P) - 1;
  }
  __device__ __forceinline__ bool live() const { return mask; }
  __device__ __forceinline__ bool inside(int p) const { return mask >> p & 1; }
  __device__ __forceinline__ int64_t patch(int p) const {
    return static_cast<int64_t>(top + row) * width + left + column + p;
  }
};

// Patches from row to row of a tile in shared memory: odd, so that the rows that a warp reads lie in different banks.
template <int P, int SPACE>
__device__ __host__ __forceinline__ constexpr int tile_pitch(int strips) {
  return (strips * P + SPACE - 1) | 1;
}

// Offsets that a thread needs once a frame, [N, threads]. In shared memory: the sums leave no registers for them.
template <int N, class I>
struct Offsets {
  Shared<I> at;
  __device__ __forceinline__ void set(int i, I offset) const { store(at + (i * blockDim.x + threadIdx.x), offset); }
  __device__ __forceinline__ I get(int i) const { return load(at + (i * blockDim.x + threadIdx.x)); }
};

// From strip to strip of a warp's finished patches in shared memory, in elements: an odd number of rows of a slab, so
// that the four strips lie in different banks.
template <class T, int P>
constexpr int kStripPitch = (P | 1) * kSlab<T>;

// 16-byte vectors that a thread brings in of a frame, and writes of one.
//
// A thread never brings more: a tile's (rows + 2)·(8·strips + 2) patches of kVectors each over 8·rows·strips threads,
// with five rows or more and, where it has a halo on both sides, three strips or more.
template <class T, int V>
constexpr int kItems = V == 1 ? 1 : kSlab<T> / V * 3 / 2;
template <class T, int V, int P>
constexpr int kSteps = V == 1 ? 1 : (32 / kLanes * P * kSlab<T> / V + 31) / 32;

// The parts of a block's shared memory, by byte offsets.
template <class T, int V, int P, int SPACE>
struct Layout {
  int taps;      // [3·SPACE·SPACE + 1, kSlab], wide
  int sums;      // [warps, kSlab], wide
  int offsets;   // [kSteps + kItems, threads], int64_t
  int places;    // [kItems, threads], int
  int tiles;     // two of [rows + SPACE - 1, pitch, kSlab]
  int tile;      // elements of one
  int exchange;  // [strips, kStripPitch]
  int bytes;     // in all
  __device__ __host__ __forceinline__ explicit Layout(const Tiling& tiling) {
    constexpr int kNumber = sizeof(T), kWide = sizeof(Wide<T>);
    tile = (tiling.rows + SPACE - 1) * tile_pitch<P, SPACE>(tiling.strips) * kSlab<T>;
    taps = 0;
    sums = taps + (3 * SPACE * SPACE + 1) * kSlab<T> * kWide;
    offsets = sums + tiling.threads / 32 * kSlab<T> * kWide;
    places = offsets + (kSteps<T, V, P> + kItems<T, V>)*tiling.threads * 8;
    tiles = places + kItems<T, V> * tiling.threads * 4;
    exchange = tiles + 2 * tile * kNumber;
    bytes = exchange + tiling.threads / kLanes * kStripPitch<T, P> * kNumber;
  }
};

// Brings the patches of one frame into shared memory, [rows + SPACE - 1, pitch, kSlab]; what lies outside the grid
// stays as clear() leaves it, zero. With V of 16 bytes a thread has at most kItems of them, which it fetches into
// registers before it computes, and puts down after; single elements go straight through. The sum with the position is
// rounded, as the reference does.
template <class T, int V, int P, int SPACE>
struct Stager {
  static constexpr int kVectors = kSlab<T> / V, kItems = inti::cuda::kItems<T, V>;

  Frames<T> frames;
  const Wide<T>* position;           // of frame 0, at the slab's first channel; or null
  int64_t position_step;             // from frame to frame
  int top, left, rows, columns;      // what is loaded: the tile and its halo, on the grid
  int width, corner, pitch;          // corner: place of (top, left) in a buffer, in patches
  int channels;                      // of the slab that exist
  Offsets<kItems, int64_t> sources;  // of a thread's vectors in a frame, or -1
  Offsets<kItems, int> targets;      // in a buffer
  Loaded<T, V> held[kItems];

  __device__ __forceinline__ Stager(const Place<T, P>& place, const Tiling& tiling, Frames<T> frames,
                                    const Wide<T>* position, int64_t dim, const Layout<T, V, P, SPACE>& layout)
      : frames(frames),
        position(position),
        position_step(dim),
        width(place.width),
        sources{dynamic_shared<int64_t>(layout.offsets) + kSteps<T, V, P> * tiling.threads},
        targets{dynamic_shared<int>(layout.places)} {
    constexpr int halo = SPACE / 2;
    pitch = tile_pitch<P, SPACE>(tiling.strips);
    top = place.top - halo > 0 ? place.top - halo : 0;
    left = place.left - halo > 0 ? place.left - halo : 0;
    const int below = place.top + tiling.rows + halo, behind = place.left + tiling.strips * P + halo;
    rows = (below < place.height ? below : place.height) - top;
    columns = (behind < width ? behind : width) - left;
    corner = (top - place.top + halo) * pitch + left - place.left + halo;
    channels = dim - place.channel < kSlab<T> ? static_cast<int>(dim - place.channel) : kSlab<T>;
    this->frames.start += place.channel;
    if (position) this->position += place.channel;
    if constexpr (V > 1) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        int patch, target;
        find(threadIdx.x + i * blockDim.x, patch, target);
        targets.set(i, target);
        sources.set(i, patch < 0 ? -1 : this->frames.start + patch * this->frames.token + channel());
      }
    }
  }
  __device__ __forceinline__ static void clear(Shared<T> buffers, int elements) {
    for (int i = threadIdx.x; i < elements; i += blockDim.x) store(buffers + i, T{});
  }
  // Vectors are numbered along the slab's channels, then the patches that are loaded.
  __device__ __forceinline__ int items() const { return rows * columns * kVectors; }
  __device__ __forceinline__ void find(int item, int& from, int& to) const {
    const int patch = item / kVectors, row = patch / columns, column = patch - row * columns;
    const int channel = item % kVectors * V;
    from = item < items() && channel < channels ? (top + row) * width + left + column : -1;
    to = (corner + row * pitch + column) * kSlab<T> + channel;
  }
  // Threads are a multiple of kVectors, so all vectors of a thread are of the same channels.
  __device__ __forceinline__ int channel() const { return threadIdx.x % kVectors * V; }

  // The thread's channels of a frame's position, all its vectors'. Only where there is a position.
  __device__ __forceinline__ Vec<Wide<T>, V> position_of(int frame) const {
    return load_wide<V>(position + frame * position_step + channel());
  }
  __device__ __forceinline__ void keep(Shared<T> at, const Vec<T, V>& value, const Vec<Wide<T>, V>& row) const {
    if (!position) return store(at, value);
    Vec<Wide<T>, V> sum = widen(value);
#pragma unroll
    for (int k = 0; k < V; ++k) sum[k] += row[k];
    store(at, narrow<T>(sum));
  }

  __device__ __forceinline__ void fetch(int frame) {
    if constexpr (V > 1) {
      const T* from = frames.base + frame * frames.frame;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int64_t source = sources.get(i);
        if (source >= 0) held[i] = start_load<V>(from + source);
      }
    }
  }
  __device__ __forceinline__ void put(Shared<T> buffer, int frame) const {
    Vec<Wide<T>, V> row;
    const bool exists = channel() < channels;
    if (position && exists) row = position_of(frame);
    if constexpr (V > 1) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (sources.get(i) < 0) continue;
        keep(buffer + targets.get(i), held[i].numbers(), row);
      }
    } else if (exists) {
      const T* first = frames.base + frames.start + frame * frames.frame + channel();
      for (int item = threadIdx.x; item < items(); item += blockDim.x) {
        int from, to;
        find(item, from, to);
        keep(buffer + to, load<V>(first + from * frames.token), row);
      }
    }
  }
};

// Calls body(frame, buffer) for each frame of [begin, end) in order, the frame's tile lying in `buffer`.
// `size`: elements of a buffer, of which there are two.
template <class Frames, class T, class Body>
__device__ __forceinline__ void walk(Frames& stager, Shared<T> buffers, int size, int begin, int end, Body body) {
  Frames::clear(buffers, 2 * size);
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

#ifndef __CUDACC_RTC__

// Patches of a strip: 7 where that wastes fewer threads on the grid's width than 8, for 16-bit 3×3×3.
inline int strip_patches(int64_t width, bool seven_built) {
  const int64_t of_seven = (width + 6) / 7 * 7, of_eight = (width + 7) / 8 * 8;
  return seven_built && of_seven < of_eight ? 7 : 8;
}

// Shared memory of a backward's block: as laid out, and where the weight's is wanted, when all else is done with, every
// warp's sums.
template <class T, int V, int P, int SPACE, bool WEIGHT>
int backward_bytes(const Tiling& t) {
  const int sums = t.threads / 32 * (3 * SPACE * SPACE + 1) * kSlab<T> * static_cast<int>(sizeof(Wide<T>));
  const int walk = Layout<T, V, P, SPACE>(t).bytes;
  return WEIGHT && sums > walk ? sums : walk;
}

// The run is as long as leaves kConvolutionBlocks blocks: frames at its ends are read twice.
template <class T>
Tiling tile_frames(int64_t batch, int64_t height, int64_t width, int64_t dim, int64_t out_frames, int patches) {
  Tiling tiling{};
  const int strips = divide_up(width, patches);
  tiling.across = divide_up(strips, kMostAcross<T>);
  tiling.strips = divide_up(strips, tiling.across);
  const int down = divide_up(height, kMostStrips<T> / tiling.strips);
  const int even = divide_up(height, down);
  tiling.rows = even >= kLeastRows || even == height ? even
                : height < kLeastRows                ? static_cast<int>(height)
                                                     : kLeastRows;
  tiling.tiles = tiling.across * divide_up(height, tiling.rows);
  tiling.slabs = divide_up(dim, kSlab<T>);
  const int64_t blocks = batch * tiling.slabs * tiling.tiles;
  const int wanted = blocks ? divide_up(kConvolutionBlocks, blocks) : 1;
  tiling.run = divide_up(out_frames, wanted < out_frames ? wanted : out_frames);
  tiling.runs = divide_up(out_frames, tiling.run);
  tiling.threads = (tiling.rows * tiling.strips * kLanes + 31) / 32 * 32;
  const int64_t high = tiling.rows + 2 < height ? tiling.rows + 2 : height;
  const int64_t wide = tiling.strips * patches + 2 < width ? tiling.strips * patches + 2 : width;
  constexpr int kFull = 16 / sizeof(T);
  if (high * wide * (kSlab<T> / kFull) > int64_t{kItems<T, kFull>} * tiling.threads)
    throw std::logic_error("inti_kernels: depthwise_conv3d: a tile has more patches than its threads can bring in");
  return tiling;
}

#endif  // __CUDACC_RTC__

}  // namespace inti::cuda
