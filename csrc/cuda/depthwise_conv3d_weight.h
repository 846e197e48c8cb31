// depthwise_conv3d's backward to weight and bias.
#pragma once

#include "depthwise_conv3d_sums.h"

namespace inti::cuda {

template <class T>
struct ConvolutionBackwardWeight : ConvolutionSizes {
  const T* x;
  Strides x_strides;
  const T* grad_y;
  Strides grad_strides;
  const Wide<T>* position;
  Wide<T>* partials;  // [batch · runs · tiles, dim, 3·SPACE·SPACE + 1]
};

// A thread keeps the sums of all taps of its channels over its strip, and meets x's frames one after the other, each
// with the gradients of the outputs that it feeds: a strip's gradients are loaded once, straight into registers (the
// eight threads of a slab read whole sectors). x lies wide in shared memory: parameters' gradients may be float32,
// which would show a rounding of x + position, and nine reads of a number take one conversion. 256 threads, 1 block an
// SM (255 registers): 27 sums a channel.
template <class T, int V, int P, int SPACE, int STRIDE>
__global__ void __launch_bounds__(kLanes* kMostStrips<T>, 1)
    depthwise_conv3d_backward_weight_kernel(const ConvolutionBackwardWeight<T> p) {
  using W = Wide<T>;
  constexpr int C = kChannelsPerThread<T>, TAPS = 3 * SPACE * SPACE;
  const int out_frames = p.frames / STRIDE;
  const Place<T, P> place(p.tiling, p.height, p.width, out_frames);
  const Layout<T, V, P, SPACE, W> layout(p.tiling);
  const int pitch = tile_pitch<P, SPACE>(p.tiling.strips);
  const Shared<W> buffers = dynamic_shared<W>(layout.tiles);
  const Shared<W> shared = dynamic_shared<W>(0);  // [warps, kSlab, TAPS + 1], when the tiles are done with
  const int64_t start = static_cast<int64_t>(place.clip) * p.x_strides.batch + p.prefix * p.x_strides.token;
  Stager<T, V, P, SPACE, W> stager(place, p.tiling, Frames<T>{p.x, start, p.x_strides.frame, p.x_strides.token},
                                   p.position, p.dim, layout);
  const int own = (place.row * pitch + place.column) * kSlab<T> + place.lane * C;
  const int64_t channel = place.channel + place.lane * C;
  const T* grad_y =
      p.grad_y + static_cast<int64_t>(place.clip) * p.grad_strides.batch + p.prefix * p.grad_strides.token + channel;

  W sums[TAPS + 1][C] = {};
  Loaded<T, C> grads[3][P] = {};  // of the outputs that a frame feeds by its time taps 0, 1 and 2
  Loaded<T, C> incoming[P];       // of the next output, under way
  const auto fetch = [&](int out) {
#pragma unroll
    for (int i = 0; i < P; ++i) {
      incoming[i] = {};
      if (out >= place.last || !place.inside(i) || channel >= p.dim) continue;
      const T* at = grad_y + out * p.grad_strides.frame + place.patch(i) * p.grad_strides.token;
      if constexpr (V >= C)
        incoming[i] = start_load<C>(at);
      else
        incoming[i] = loaded(Vec<T, C>{{load(at), channel + 1 < p.dim ? load(at + 1) : T{}}});
    }
  };
  const auto arrive = [&] {
#pragma unroll
    for (int i = 0; i < P; ++i) {
      grads[0][i] = incoming[i];
      const auto grad = widen(incoming[i].numbers());
#pragma unroll
      for (int c = 0; c < C; ++c) sums[TAPS][c] += grad[c];
    }
  };
  const auto shift = [&](int from, int to) {
#pragma unroll
    for (int i = 0; i < P; ++i) grads[to][i] = grads[from][i];
  };
  const auto add = [&](Shared<W> tile, bool at_zero, bool at_one, bool at_two) {
#pragma unroll
    for (int h = 0; h < SPACE; ++h) {
      const Row<T, P, SPACE> row(tile + h * pitch * kSlab<T>);
#pragma unroll
      for (int time = 0; time < 3; ++time) {
        if (!(time == 0 ? at_zero : time == 1 ? at_one : at_two)) continue;
#pragma unroll
        for (int i = 0; i < P; ++i) {
          const auto grad = widen(grads[time][i].numbers());
#pragma unroll
          for (int w = 0; w < SPACE; ++w) {
#pragma unroll
            for (int c = 0; c < C; ++c) sums[(time * SPACE + h) * SPACE + w][c] += grad[c] * row.at[i + w][c];
          }
        }
      }
    }
  };

  int begin = STRIDE * place.first - 1, end = STRIDE == 1 ? place.last + 1 : STRIDE * place.last;
  fetch(place.first);
  if (begin < 0) {
    begin = 0;  // the frame before, which does not exist, would have brought the first output's
    arrive();
    shift(0, 1);
    fetch(1);
  }
  if (end > p.frames) end = p.frames;
  walk(stager, buffers, layout.tile, begin, end, [&](int frame, Shared<W> tile) {
    tile = tile + own;
    if (STRIDE == 2) {
      if (frame % 2 == 0) {
        if (place.live()) add(tile, false, true, false);
        shift(1, 2);
      } else {
        arrive();
        fetch((frame + 1) / 2 + 1);
        if (place.live()) add(tile, true, false, true);  // nothing is at 2 in the first frame: zeros
        shift(0, 1);
      }
    } else {
      arrive();
      fetch(frame + 2);
      if (place.live()) add(tile, true, true, true);
      shift(1, 2);
      shift(0, 1);
    }
  });

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k <= TAPS; ++k) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      W sum = sums[k][c];
      sum += __shfl_xor_sync(0xffffffffu, sum, 8);
      sum += __shfl_xor_sync(0xffffffffu, sum, 16);
      if (lane < kLanes) store(shared + (warp * kSlab<T> + lane * C + c) * (TAPS + 1) + k, sum);
    }
  }
  __syncthreads();
  W* partials = p.partials + (static_cast<int64_t>(place.part) * p.dim + place.channel) * (TAPS + 1);
  for (int i = threadIdx.x; i < kSlab<T> * (TAPS + 1); i += blockDim.x) {
    if (place.channel + i / (TAPS + 1) >= p.dim) break;
    W sum = 0;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += load(shared + w * kSlab<T> * (TAPS + 1) + i);
    store(partials + i, sum);
  }
}

}  // namespace inti::cuda
