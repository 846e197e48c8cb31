// depthwise_conv3d's backward: to x and position, and by the same walk to weight and bias.
#pragma once

#include "depthwise_conv3d_sums.h"

namespace inti::cuda {

template <class T>
struct ConvolutionBackward : ConvolutionSizes {
  const T* grad_y;
  Strides grad_strides;
  const void* weight;
  DType parameter_dtype;
  T* grad_x;  // or null
  bool accumulate;
  Wide<T>* position_partials;  // [batch · tiles, frames, dim], or null
  // The weight's:
  const T* x;
  Strides x_strides;
  const Wide<T>* position;
  Wide<T>* weight_partials;  // [batch · runs · tiles, dim, 3·SPACE·SPACE + 1]
};

// A frame of x while frames of grad_y feed it: the strip's gradients and, for the weight's, its x + position.
template <class T, int P>
struct OpenFrame {
  Sums<T, P> grad, x;
  __device__ __forceinline__ void clear() {
    const Vec<Wide<T>, kChannelsPerThread<T>> zero{};
    grad.set(zero);
    x.set(zero);
  }
};

// Of a thread's channels, over its strips: those of the taps, and behind them the bias's.
template <class T, int SPACE>
struct WeightSums {
  static constexpr int C = kChannelsPerThread<T>, TAPS = 3 * SPACE * SPACE;
  Wide<T> at[TAPS + 1][C] = {};
};

// The number of the tap that multiplies grad_y's element at (time, h, w) of the 3×SPACE×SPACE around an element of x.
template <int SPACE>
__device__ __forceinline__ constexpr int turned(int time, int h, int w) {
  return 3 * SPACE * SPACE - 1 - ((time * SPACE + h) * SPACE + w);
}

// A frame of grad_y feeds N frames of x by the taps of one time step each, turned round; the same elements' products
// with those frames' x are the weight's. grad_y's own elements are summed for the bias where `owned`.
// tile, taps, times: as feed()'s; to_x: whether the gradient of x or of its position is wanted.
template <int P, int SPACE, bool WEIGHT, int N, class T>
__device__ __forceinline__ void feed_back(Shared<T> tile, int pitch, Shared<Wide<T>> taps, const int (&times)[N],
                                          OpenFrame<T, P>* const (&frames)[N], WeightSums<T, SPACE>& sums, bool to_x,
                                          bool owned) {
  constexpr int C = kChannelsPerThread<T>;
// Three frames' sums leave no registers for the next row's loads to come early. The weight's sums are in registers, and
// so must be known by constants.
#pragma unroll(N == 3 && !WEIGHT ? 1 : SPACE)
  for (int h = 0; h < SPACE; ++h) {
    const Row<T, P, SPACE> row(tile + h * pitch * kSlab<T>);
    if (!WEIGHT || to_x) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int w = 0; w < SPACE; ++w) {
          const auto weight = load<C>(taps + turned<SPACE>(times[n], h, w) * kSlab<T>);
#pragma unroll
          for (int p = 0; p < P; ++p) {
#pragma unroll
            for (int c = 0; c < C; ++c) frames[n]->grad.at[p][c] += weight[c] * row.at[p + w][c];
          }
        }
      }
    }
    if constexpr (WEIGHT) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int w = 0; w < SPACE; ++w) {
#pragma unroll
          for (int p = 0; p < P; ++p) {
#pragma unroll
            for (int c = 0; c < C; ++c)
              sums.at[turned<SPACE>(times[n], h, w)][c] += frames[n]->x.at[p][c] * row.at[p + w][c];
          }
        }
      }
      if (h != SPACE / 2 || !owned) continue;
#pragma unroll
      for (int p = 0; p < P; ++p) {
#pragma unroll
        for (int c = 0; c < C; ++c) sums.at[3 * SPACE * SPACE][c] += row.at[p + SPACE / 2][c];
      }
    }
  }
}

// A thread's strip of x in N frames, straight from memory into registers: the eight threads of a slab read whole
// sectors. Each element is loaded by one thread of all blocks, once: where rows are aligned a step before it is used,
// elsewhere when it is.
template <class T, int V, int P, int N>
struct Strip {
  static constexpr int C = kChannelsPerThread<T>;
  const T* base;            // the strip's first patch in frame 0, at the thread's channels
  const Wide<T>* position;  // of frame 0, at the thread's channels; or null
  int64_t frame, token, position_step;
  int end;        // frames from here on are another block's, and zero here
  unsigned mask;  // as Place's; 0 where the channel doesn't exist
  bool both;      // whether the second channel exists
  Loaded<T, C> held[N][P];
  Vec<Wide<T>, C> rows[N];

  __device__ __forceinline__ Strip(const ConvolutionBackward<T>& p, const Place<T, P>& place)
      : frame(p.x_strides.frame), token(p.x_strides.token), position_step(p.dim), end(N * place.last) {
    const int64_t channel = place.channel + place.lane * C;
    base = p.x + static_cast<int64_t>(place.clip) * p.x_strides.batch + (p.prefix + place.patch(0)) * token + channel;
    position = p.position ? p.position + channel : nullptr;
    mask = channel < p.dim ? place.mask : 0;
    both = channel + 1 < p.dim;
  }
  // Starts loading the N frames from `first` on.
  __device__ __forceinline__ void fetch(int first) {
    if constexpr (V > 1) {
#pragma unroll
      for (int n = 0; n < N; ++n) bring(n, first + n);
    }
  }
  // The frame `number`, fetched as the n-th.
  __device__ __forceinline__ void arrive(int n, int number, Sums<T, P>& x) {
    if constexpr (V == 1) bring(n, number);
#pragma unroll
    for (int i = 0; i < P; ++i) {
      const auto numbers = widen(held[n][i].numbers());
#pragma unroll
      for (int c = 0; c < C; ++c) x.at[i][c] = mask >> i & 1 ? numbers[c] + rows[n][c] : 0;
    }
  }

 private:
  __device__ __forceinline__ void bring(int n, int number) {
    const unsigned there = number < end ? mask : 0;
    rows[n] = {};
#pragma unroll
    for (int i = 0; i < P; ++i) {
      held[n][i] = {};
      if (there >> i & 1) held[n][i] = channels(base + number * frame + i * token);
    }
    if (there && position) rows[n] = row_of(position + number * position_step);
  }
  __device__ __forceinline__ Loaded<T, C> channels(const T* at) const {
    if constexpr (V >= C)
      return start_load<C>(at);
    else
      return loaded(Vec<T, C>{{load(at), both ? load(at + 1) : T{}}});
  }
  __device__ __forceinline__ Vec<Wide<T>, C> row_of(const Wide<T>* at) const {
    if constexpr (V >= C)
      return load<C>(at);
    else
      return {{load(at), both ? load(at + 1) : Wide<T>{}}};
  }
};

// The block's sums of the weight and the bias: over a warp's strips by shuffles, over the warps in shared memory,
// [warps, kSlab, TAPS + 1], in which nothing else is wanted any more.
template <class T, int P, int SPACE>
__device__ __forceinline__ void write_weight_sums(const WeightSums<T, SPACE>& sums, const Place<T, P>& place,
                                                  const ConvolutionBackward<T>& p) {
  constexpr int C = kChannelsPerThread<T>, NUMBERS = 3 * SPACE * SPACE + 1;
  const Shared<Wide<T>> shared = dynamic_shared<Wide<T>>(0);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncthreads();
#pragma unroll
  for (int k = 0; k < NUMBERS; ++k) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      Wide<T> sum = sums.at[k][c];
      sum += __shfl_xor_sync(0xffffffffu, sum, 8);
      sum += __shfl_xor_sync(0xffffffffu, sum, 16);
      if (lane < kLanes) store(shared + (warp * kSlab<T> + lane * C + c) * NUMBERS + k, sum);
    }
  }
  __syncthreads();
  Wide<T>* partials = p.weight_partials + (static_cast<int64_t>(place.part) * p.dim + place.channel) * NUMBERS;
  for (int i = threadIdx.x; i < kSlab<T> * NUMBERS; i += blockDim.x) {
    if (place.channel + i / NUMBERS >= p.dim) break;
    Wide<T> sum = 0;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += load(shared + w * kSlab<T> * NUMBERS + i);
    store(partials + i, sum);
  }
}

// The gather form: every element of grad_x is written by one block, once. grad_y's frames are what is walked along, and
// an open frame of grad_x takes the taps turned round. The weight's gradient is summed by the same walk, over the
// frames and patches of x that are the block's: grad_y and x are read by one block in place of two, and a row of grad_y
// in shared memory serves both. Occupancy as the forward's; with the weight's 27 sums a channel, 1 block an SM (255
// registers): 8 warps, whose next frames of grad_y and of x are under way, 12 KiB and more.
template <class T, int V, int P, int SPACE, int STRIDE, bool WEIGHT>
__global__ void __launch_bounds__(kLanes* kMostStrips<T>, WEIGHT ? 1 : kBlocks<T, V>)
    depthwise_conv3d_backward_kernel(const ConvolutionBackward<T> p) {
  constexpr int C = kChannelsPerThread<T>, TAPS = 3 * SPACE * SPACE;
  const int out_frames = p.frames / STRIDE, patches = p.height * p.width;
  const Place<T, P> place(p.tiling, p.height, p.width, out_frames);
  const Layout<T, V, P, SPACE> layout(p.tiling);
  const int pitch = tile_pitch<P, SPACE>(p.tiling.strips);
  const Shared<Wide<T>> taps = dynamic_shared<Wide<T>>(layout.taps);
  const Shared<Wide<T>> warp_sums = dynamic_shared<Wide<T>>(layout.sums);
  const Shared<T> buffers = dynamic_shared<T>(layout.tiles);
  const bool to_x = p.grad_x || p.position_partials;
  if (to_x) stage_taps<TAPS, T>(taps, p.weight, nullptr, p.parameter_dtype, place.channel, p.dim);
  const int64_t frame_size = (p.prefix + patches) * p.dim;
  const Output<T> out{p.grad_x, static_cast<int64_t>(place.clip) * p.frames * frame_size + p.prefix * p.dim, frame_size,
                      p.dim, p.accumulate};
  const Writer<T, V, P> writer(place, p.tiling, out, dynamic_shared<T>(layout.exchange),
                               dynamic_shared<int64_t>(layout.offsets));
  if (place.tile == 0 && p.grad_x && !p.accumulate)
    clear_prefix<V>(place, out, p.prefix, STRIDE * place.first, STRIDE * place.last);
  Wide<T>* partials = p.position_partials;
  if (partials) partials += (static_cast<int64_t>(place.clip) * p.tiling.tiles + place.tile) * p.frames * p.dim;

  const int64_t start = static_cast<int64_t>(place.clip) * p.grad_strides.batch + p.prefix * p.grad_strides.token;
  const Frames<T> frames{p.grad_y, start, p.grad_strides.frame, p.grad_strides.token};
  Stager<T, V, P, SPACE> stager(place, p.tiling, frames, nullptr, p.dim, layout);
  const Shared<Wide<T>> own_taps = taps + place.lane * C;
  const int own = (place.row * pitch + place.column) * kSlab<T> + place.lane * C;
  const auto finish_frame = [&](const OpenFrame<T, P>& open, int frame) {
    if (p.grad_x) writer.write(open.grad, place, frame);
    if (partials) sum_tile(open.grad, place, warp_sums, partials + frame * p.dim, p.dim);
  };

  int begin = place.first, end = place.last + 1;
  if (STRIDE == 1 && begin > 0) --begin;
  if (end > out_frames) end = out_frames;
  OpenFrame<T, P> before, at, behind;
  before.clear();
  at.clear();
  behind.clear();
  WeightSums<T, SPACE> sums;
  Strip<T, V, P, STRIDE> strip(p, place);
  if constexpr (WEIGHT) {
    strip.fetch(STRIDE * place.first);
    if (STRIDE == 1) {
      strip.arrive(0, place.first, at.x);
      strip.fetch(place.first + 1);
    }
  }
  walk(stager, buffers, layout.tile, begin, end, [&](int frame, Shared<T> tile) {
    tile = tile + own;
    const bool owned = frame >= place.first && frame < place.last;
    if (STRIDE == 2) {
      // Frame j of grad_y feeds frames 2j - 1, 2j and 2j + 1 of grad_x by the taps 0, 1 and 2, which are turned.
      if (frame == place.last) {
        if (place.live()) feed_back<P, SPACE, WEIGHT>(tile, pitch, own_taps, {2}, {&before}, sums, to_x, owned);
        return;
      }
      at.clear();
      behind.clear();
      if constexpr (WEIGHT) {
        strip.arrive(0, 2 * frame, at.x);
        strip.arrive(STRIDE - 1, 2 * frame + 1, behind.x);
        strip.fetch(2 * frame + 2);
      }
      if (place.live())
        feed_back<P, SPACE, WEIGHT>(tile, pitch, own_taps, {2, 1, 0}, {&before, &at, &behind}, sums, to_x, owned);
      if (frame > place.first) finish_frame(before, 2 * frame - 1);
      finish_frame(at, 2 * frame);
      before = behind;
    } else {
      // Frame j feeds frames j - 1, j and j + 1 by the taps 0, 1 and 2.
      if (frame < place.first) {
        if (place.live()) feed_back<P, SPACE, WEIGHT>(tile, pitch, own_taps, {0}, {&at}, sums, to_x, owned);
        return;
      }
      if (frame > place.first) {
        before = at;
        at = behind;
        behind.clear();
      }
      if constexpr (WEIGHT) {
        strip.arrive(0, frame + 1, behind.x);
        strip.fetch(frame + 2);
      }
      if (frame == place.first) {
        if (place.live()) feed_back<P, SPACE, WEIGHT>(tile, pitch, own_taps, {1, 0}, {&at, &behind}, sums, to_x, owned);
        return;
      }
      if (place.live())
        feed_back<P, SPACE, WEIGHT>(tile, pitch, own_taps, {2, 1, 0}, {&before, &at, &behind}, sums, to_x, owned);
      finish_frame(before, frame - 1);
    }
  });
  if (STRIDE == 2) finish_frame(before, 2 * place.last - 1);
  if (STRIDE == 1 && place.last == p.frames) finish_frame(at, place.last - 1);
  if constexpr (WEIGHT) write_weight_sums(sums, place, p);
}

}  // namespace inti::cuda
