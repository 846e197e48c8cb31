// What depthwise_conv3d's kernels compute with: a thread's sums, the taps, and the way of finished sums to memory.
#pragma once

#include "depthwise_conv3d_tile.h"

namespace inti::cuda {

// The strip's patches and what lies beside them, of row `row` of a tile: [P + SPACE - 1][channels of the thread].
template <class T, int P, int SPACE>
struct Row {
  static constexpr int C = kChannelsPerThread<T>;
  Wide<T> at[P + SPACE - 1][C];
  __device__ __forceinline__ explicit Row(Shared<T> row) {
#pragma unroll
    for (int p = 0; p < P + SPACE - 1; ++p) {
      const auto values = widen(load<C>(row + p * kSlab<T>));
#pragma unroll
      for (int c = 0; c < C; ++c) at[p][c] = values[c];
    }
  }
};

// Sums of a thread: [patches][channels], wide.
template <class T, int P>
struct Sums {
  static constexpr int C = kChannelsPerThread<T>;
  Wide<T> at[P][C];
  __device__ __forceinline__ void set(const Vec<Wide<T>, C>& value) {
#pragma unroll
    for (int p = 0; p < P; ++p) {
#pragma unroll
      for (int c = 0; c < C; ++c) at[p][c] = value[c];
    }
  }
};

// Adds a frame's tile, by the taps of one time step each, to N outputs.
// tile: at the strip's first patch and channel; taps: [3·SPACE·SPACE, kSlab] at the thread's first channel; times: the
// time taps.
template <int P, int SPACE, int N, class T>
__device__ __forceinline__ void feed(Shared<T> tile, int pitch, Shared<Wide<T>> taps, const int (&times)[N],
                                     Sums<T, P>* const (&sums)[N]) {
  constexpr int C = kChannelsPerThread<T>;
// Three outputs' sums leave no registers for the next row's loads to come early.
#pragma unroll(N == 3 ? 1 : SPACE)
  for (int h = 0; h < SPACE; ++h) {
    const Row<T, P, SPACE> row(tile + h * pitch * kSlab<T>);
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int w = 0; w < SPACE; ++w) {
        const int tap = (times[n] * SPACE + h) * SPACE + w;
        const auto weight = load<C>(taps + tap * kSlab<T>);
#pragma unroll
        for (int p = 0; p < P; ++p) {
#pragma unroll
          for (int c = 0; c < C; ++c) sums[n]->at[p][c] += weight[c] * row.at[p + w][c];
        }
      }
    }
  }
}

// The block's taps, and behind them the bias: [3·SPACE·SPACE + 1, kSlab], wide, zero where a channel doesn't exist.
template <int TAPS, class T>
__device__ __forceinline__ void stage_taps(Shared<Wide<T>> to, const void* weight, const void* bias, DType dtype,
                                           int channel, int64_t dim) {
  for (int i = threadIdx.x; i < (TAPS + 1) * kSlab<T>; i += blockDim.x) {
    const int tap = i / kSlab<T>;
    const int64_t c = channel + i % kSlab<T>;
    Wide<T> value = 0;
    if (c < dim && tap < TAPS) value = read<Wide<T>>(weight, dtype, c * TAPS + tap);
    if (c < dim && tap == TAPS && bias) value = read<Wide<T>>(bias, dtype, c);
    store(to + i, value);
  }
}

// Where finished tiles go: y, or the gradient of x.
template <class T>
struct Output {
  T* base;  // the first patch of the clip's frame 0 is at base + start
  int64_t start;
  int64_t frame;  // from frame to frame
  int64_t dim;
  bool accumulate;
};

// Writes strips of finished sums: by way of shared memory, of which every warp has its own part, so that a thread
// writes 16 bytes; where rows aren't aligned, as they are.
template <class T, int V, int P>
struct Writer {
  static constexpr int C = kChannelsPerThread<T>, kVectors = kSlab<T> / V, kStrips = 32 / kLanes;
  static constexpr int kVectorsOfWarp = kStrips * P * kVectors, kSteps = inti::cuda::kSteps<T, V, P>;
  Output<T> out;
  Shared<T> exchange;                // [strips of the block, kStripPitch]
  Offsets<kSteps, int64_t> offsets;  // in a frame, of what the thread writes in each step, or -1

  __device__ __forceinline__ Writer(const Place<T, P>& place, const Tiling& tiling, const Output<T>& out,
                                    Shared<T> exchange, Shared<int64_t> offsets)
      : out(out), exchange(exchange + threadIdx.x / 32 * kStrips * kStripPitch<T, P>), offsets{offsets} {
    this->out.start += place.channel;
    if constexpr (V > 1) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const int number = threadIdx.x % 32 + 32 * i;
        const int strip = threadIdx.x / 32 * kStrips + number / (P * kVectors);
        const int row = place.top + strip % tiling.rows;
        const int column = place.left + strip / tiling.rows * P + number / kVectors % P;
        const bool there = number < kVectorsOfWarp && strip < tiling.rows * tiling.strips && row < place.height &&
                           column < place.width && place.channel + number % kVectors * V < out.dim;
        this->offsets.set(i, there ? this->out.start + (static_cast<int64_t>(row) * place.width + column) * out.dim +
                                         number % kVectors * V
                                   : -1);
      }
    }
  }

  __device__ __forceinline__ void write(const Sums<T, P>& sums, const Place<T, P>& place, int frame) const {
    T* to = out.base + frame * out.frame;
    if constexpr (V == 1) {
#pragma unroll
      for (int p = 0; p < P; ++p) {
        if (!place.inside(p)) continue;
#pragma unroll
        for (int c = 0; c < C; ++c) {
          if (place.channel + place.lane * C + c >= out.dim) continue;
          T* at = to + out.start + place.patch(p) * out.dim + place.lane * C + c;
          store(at, narrow<T>(out.accumulate ? sums.at[p][c] + widen(load(at)) : sums.at[p][c]));
        }
      }
    } else {
      const int lane = threadIdx.x % 32;
#pragma unroll
      for (int p = 0; p < P; ++p) {
        Vec<Wide<T>, C> value;
#pragma unroll
        for (int c = 0; c < C; ++c) value[c] = sums.at[p][c];
        store(exchange + (place.strip % kStrips * kStripPitch<T, P> + p * kSlab<T> + place.lane * C), narrow<T>(value));
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const int64_t offset = offsets.get(i);
        if (offset < 0) continue;
        const int number = lane + 32 * i, vector = number % (P * kVectors);
        auto value = load<V>(exchange + (number / (P * kVectors) * kStripPitch<T, P> + vector * V));
        T* at = to + offset;
        if (out.accumulate) {
          auto sum = widen(value);
          const auto old = widen(load<V>(at));
#pragma unroll
          for (int k = 0; k < V; ++k) sum[k] += old[k];
          value = narrow<T>(sum);
        }
        store(at, value);
      }
      __syncwarp();
    }
  }
};

// The prefix tokens have no place on the grid: zero.
template <int V, int P, class T>
__device__ __forceinline__ void clear_prefix(const Place<T, P>& place, const Output<T>& out, int prefix, int begin,
                                             int end) {
  constexpr int kVectors = kSlab<T> / V;
  const int per_frame = prefix * kVectors;
  for (int i = threadIdx.x; i < (end - begin) * per_frame; i += blockDim.x) {
    const int64_t frame = begin + i / per_frame;
    const int token = i % per_frame / kVectors, channel = place.channel + i % kVectors * V;
    if (channel < out.dim)
      store(out.base + out.start + frame * out.frame + (token - prefix) * out.dim + channel, Vec<T, V>{});
  }
}

// The sum of a finished tile over its patches, which is the position's gradient: over the strip in registers, over the
// warp's strips by shuffles, over the warps in shared memory, [warps, kSlab]. Two barriers.
template <int P, class T>
__device__ __forceinline__ void sum_tile(const Sums<T, P>& sums, const Place<T, P>& place, Shared<Wide<T>> shared,
                                         Wide<T>* to, int64_t dim) {
  constexpr int C = kChannelsPerThread<T>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    Wide<T> sum = 0;
#pragma unroll
    for (int p = 0; p < P; ++p) sum += place.inside(p) ? sums.at[p][c] : 0;
    sum += __shfl_xor_sync(0xffffffffu, sum, 8);
    sum += __shfl_xor_sync(0xffffffffu, sum, 16);
    if (lane < kLanes) store(shared + warp * kSlab<T> + lane * C + c, sum);
  }
  __syncthreads();
  const int channel = threadIdx.x;
  if (channel < kSlab<T> && place.channel + channel < dim) {
    Wide<T> sum = 0;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += load(shared + w * kSlab<T> + channel);
    store(to + place.channel + channel, sum);
  }
  __syncthreads();
}

}  // namespace inti::cuda
