// The interpolation of each pair of frames, forward and backward, for pair_interpolate and interpolation_head: the two
// differ only in where a pair's two weights come from, which is a Source's business.
#pragma once

#include "column_sums.h"
#include "inti/cuda/pair_interpolate.h"
#include "inti/device.h"
#include "partial_sums.h"
#include "vectors.h"

namespace inti::cuda {

// (α, β) of a token pair. Both by their own quotient: 1 - α would lose a small β's digits.
template <class S>
struct PairWeights {
  S first, second;
};

// A Source has
//   using Softmax = …;                                   what the weights are computed in
//   PairWeights<Softmax> weights(int64_t pair) const;    of a token pair; for all lanes of a warp the same
//   void store_weights(int64_t pair, weights) const;     called by one lane
//   Softmax grad_difference(int64_t pair) const;         upstream gradient of α less that of β
//   bool wants_gradient() const;
//   void store_gradient(int64_t pair, Softmax) const;    gradient of (first - second logit); called by one lane

struct InterpolateForward {
  int64_t frames, tokens, dim;
  const void* x;  // [batch, frames, tokens, dim], x_strides
  Strides x_strides;
  const void* position;  // wide [frames, dim], or null
  void* z;               // [batch, frames/2, tokens, dim]
  unsigned pairs, tiles;
};

struct InterpolateBackward {
  int64_t frames, tokens, dim;
  const void* x;
  Strides x_strides;
  const void* position;
  const void* grad_z;
  Strides grad_z_strides;
  void* grad_x;  // [batch, frames, tokens, dim], or null
  bool accumulate;
  void* partials;  // wide [batch, tiles, frames, dim], or null: the position's
  unsigned pairs, tiles, tile_tokens;
};

constexpr int kInterpolateWarps = 4;
constexpr int kForwardTokens = 2, kBackwardTokens = 4;  // token pairs of a warp

// The block's pair of frames and tile of tokens.
struct InterpolateTile {
  int64_t row;  // pair of frames, over all clips
  unsigned clip, pair, tile;
  __device__ __forceinline__ InterpolateTile(unsigned pairs, unsigned tiles) {
    const unsigned over_clips = blockIdx.x / tiles;
    tile = blockIdx.x - over_clips * tiles;
    clip = over_clips / pairs;
    pair = over_clips - clip * pairs;
    row = over_clips;
  }
};

// A warp has two token pairs and walks along the channels: four 16-byte loads a thread are in flight at a time, the
// pairs' weights are computed once, and a pair's position is read once for both. 128 threads, 6 blocks an SM
// (80 registers, with fewer half of the loads would wait): 24 warps · 32 · 64 bytes = 48 KiB in flight.
template <class T, int V, class Source>
__global__ void __launch_bounds__(32 * kInterpolateWarps, 6)
    interpolate_forward_kernel(const InterpolateForward p, const Source source) {
  using W = Wide<T>;
  const InterpolateTile at(p.pairs, p.tiles);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const T* x = static_cast<const T*>(p.x) + at.clip * p.x_strides.batch + 2 * at.pair * p.x_strides.frame;
  T* z = static_cast<T*>(p.z) + at.row * p.tokens * p.dim;
  const W* position = static_cast<const W*>(p.position);
  if (position) position += 2 * at.pair * p.dim;

  const int64_t first = static_cast<int64_t>(at.tile) * (kForwardTokens * kInterpolateWarps) + warp;
  if (first >= p.tokens) return;
  W alpha[kForwardTokens], beta[kForwardTokens];
  bool live[kForwardTokens];
  const T* from[kForwardTokens];
  T* to[kForwardTokens];
#pragma unroll
  for (int i = 0; i < kForwardTokens; ++i) {
    // A token that isn't there stands for the warp's first: loads need no branch then, only the store does.
    live[i] = first + i * kInterpolateWarps < p.tokens;
    const int64_t token = live[i] ? first + i * kInterpolateWarps : first;
    const auto weights = source.weights(at.row * p.tokens + token);
    if (lane == 0 && live[i]) source.store_weights(at.row * p.tokens + token, weights);
    alpha[i] = static_cast<W>(weights.first);
    beta[i] = static_cast<W>(weights.second);
    from[i] = x + token * p.x_strides.token;
    to[i] = z + token * p.dim;
  }

  for (int64_t channel = lane * V; channel < p.dim; channel += 32 * V) {
    Loaded<T, V> even[kForwardTokens], odd[kForwardTokens];  // [V] of each token
#pragma unroll
    for (int i = 0; i < kForwardTokens; ++i) {
      even[i] = start_load<V>(from[i] + channel);
      odd[i] = start_load<V>(from[i] + p.x_strides.frame + channel);
    }
    Vec<W, V> even_position{}, odd_position{};
    if (position) {
      even_position = load_wide<V>(position + channel);
      odd_position = load_wide<V>(position + p.dim + channel);
    }
#pragma unroll
    for (int i = 0; i < kForwardTokens; ++i) {
      const auto a = widen(even[i].numbers()), b = widen(odd[i].numbers());
      Vec<W, V> sum;
#pragma unroll
      for (int k = 0; k < V; ++k) sum[k] = alpha[i] * (a[k] + even_position[k]) + beta[i] * (b[k] + odd_position[k]);
      if (live[i]) store(to[i] + channel, narrow<T>(sum));
    }
  }
}

// As the forward, four token pairs a warp: twelve 16-byte loads in flight. grad_x needs no sum over channels and is
// written in the same pass; the sum that the weights' gradient needs, Σ grad_z·(x[2j] - x[2j+1]), ends by shuffles.
// The position's sums over the tile's tokens stay in registers over a warp's tokens, and meet in shared memory, two
// buffers in turn so that a step has one barrier. 128 threads, 3 blocks an SM (168 registers): 12 warps · 32 · 192
// bytes = 72 KiB in flight.
template <class T, int V, class Source>
__global__ void __launch_bounds__(32 * kInterpolateWarps, 3)
    interpolate_backward_kernel(const InterpolateBackward p, const Source source) {
  using W = Wide<T>;
  using S = typename Source::Softmax;
  constexpr int G = kExchanged<W, V>;
  constexpr int kBuffer = kInterpolateWarps * 2 * 32 * V;  // [warps, frame, V / G, lanes, G]
  const InterpolateTile at(p.pairs, p.tiles);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const T* x = static_cast<const T*>(p.x) + at.clip * p.x_strides.batch + 2 * at.pair * p.x_strides.frame;
  const T* grad_z =
      static_cast<const T*>(p.grad_z) + at.clip * p.grad_z_strides.batch + at.pair * p.grad_z_strides.frame;
  T* grad_x = static_cast<T*>(p.grad_x);
  if (grad_x) grad_x += (at.clip * p.frames + 2 * at.pair) * p.tokens * p.dim;
  const W* position = static_cast<const W*>(p.position);
  if (position) position += 2 * at.pair * p.dim;
  W* partials = static_cast<W*>(p.partials);
  if (partials) partials += ((static_cast<int64_t>(at.clip) * p.tiles + at.tile) * p.frames + 2 * at.pair) * p.dim;

  const int64_t first = static_cast<int64_t>(at.tile) * p.tile_tokens + warp;
  int64_t last = first - warp + p.tile_tokens;
  if (last > p.tokens) last = p.tokens;
  S alpha[kBackwardTokens], beta[kBackwardTokens];
  W sums[kBackwardTokens];
  bool live[kBackwardTokens];
  int64_t tokens[kBackwardTokens];
#pragma unroll
  for (int i = 0; i < kBackwardTokens; ++i) {
    // A token that isn't there stands for the tile's last, with a gradient of zero: it adds nothing to the position's
    // sums. Weights of zero would not do: an infinite gradient times zero is NaN.
    live[i] = first + i * kInterpolateWarps < last;
    tokens[i] = live[i] ? first + i * kInterpolateWarps : last - 1;
    const auto weights = source.weights(at.row * p.tokens + tokens[i]);
    alpha[i] = weights.first;
    beta[i] = weights.second;
    sums[i] = 0;
  }

  const bool wants_x = source.wants_gradient();
  int step = 0;
  // Every thread takes every step: there is a barrier in it.
  for (int64_t base = 0; base < p.dim; base += 32 * V, ++step) {
    const int64_t channel = base + lane * V;
    Vec<W, V> even_sum{}, odd_sum{};  // [V]: the position's, of this warp's tokens
    if (channel < p.dim) {
      Loaded<T, V> grad[kBackwardTokens], even[kBackwardTokens], odd[kBackwardTokens];
#pragma unroll
      for (int i = 0; i < kBackwardTokens; ++i) {
        const T* from = grad_z + tokens[i] * p.grad_z_strides.token + channel;
        grad[i] = live[i] ? start_load<V>(from) : Loaded<T, V>{};
      }
      if (wants_x) {
        Vec<W, V> between{};  // position of the even frame less that of the odd one
        if (position) {
          const auto a = load_wide<V>(position + channel), b = load_wide<V>(position + p.dim + channel);
#pragma unroll
          for (int k = 0; k < V; ++k) between[k] = a[k] - b[k];
        }
#pragma unroll
        for (int i = 0; i < kBackwardTokens; ++i) {
          const T* from = x + tokens[i] * p.x_strides.token + channel;
          even[i] = start_load<V>(from);
          odd[i] = start_load<V>(from + p.x_strides.frame);
        }
#pragma unroll
        for (int i = 0; i < kBackwardTokens; ++i) {
          const auto g = widen(grad[i].numbers()), a = widen(even[i].numbers()), b = widen(odd[i].numbers());
#pragma unroll
          for (int k = 0; k < V; ++k) sums[i] += g[k] * ((a[k] - b[k]) + between[k]);
        }
      }
#pragma unroll
      for (int i = 0; i < kBackwardTokens; ++i) {
        const auto g = widen(grad[i].numbers());
        const W of_even = static_cast<W>(alpha[i]), of_odd = static_cast<W>(beta[i]);
        Vec<W, V> even_grad, odd_grad;
#pragma unroll
        for (int k = 0; k < V; ++k) {
          even_grad[k] = of_even * g[k];
          odd_grad[k] = of_odd * g[k];
          even_sum[k] += even_grad[k];
          odd_sum[k] += odd_grad[k];
        }
        if (grad_x && live[i]) {
          T* to = grad_x + tokens[i] * p.dim + channel;
          T* behind = to + p.tokens * p.dim;
          if (p.accumulate) {
            const auto old_even = widen(load<V>(to)), old_odd = widen(load<V>(behind));
#pragma unroll
            for (int k = 0; k < V; ++k) {
              even_grad[k] += old_even[k];
              odd_grad[k] += old_odd[k];
            }
          }
          store(to, narrow<T>(even_grad));
          store(behind, narrow<T>(odd_grad));
        }
      }
    }
    if (!partials) continue;
    const Shared<W> buffer = dynamic_shared<W>(0) + (step % 2) * kBuffer;
#pragma unroll
    for (int group = 0; group < V / G; ++group) {
      Vec<W, G> even_part, odd_part;
#pragma unroll
      for (int k = 0; k < G; ++k) {
        even_part[k] = even_sum[group * G + k];
        odd_part[k] = odd_sum[group * G + k];
      }
      const int place = (warp * 2 * V / G + group) * 32 * G + lane * G;
      store(buffer + place, even_part);
      store(buffer + (place + V / G * 32 * G), odd_part);
    }
    __syncthreads();
    // A thread adds up the warps' sums of one group.
    const int number = threadIdx.x / 32;  // frame · (V / G) + group
    const int64_t to = base + lane * V + number % (V / G) * G;
    if (number < 2 * V / G && to < p.dim) {
      Vec<W, G> total{};
#pragma unroll
      for (int w = 0; w < kInterpolateWarps; ++w) {
        const auto part = load<G>(buffer + ((w * 2 * V / G + number) * 32 + lane) * G);
#pragma unroll
        for (int k = 0; k < G; ++k) total[k] += part[k];
      }
      store(partials + (number / (V / G)) * p.dim + to, total);
    }
  }

  if (!wants_x) return;
#pragma unroll
  for (int i = 0; i < kBackwardTokens; ++i) {
    W sum = sums[i];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (lane == 0 && live[i]) {
      const int64_t pair = at.row * p.tokens + tokens[i];
      source.store_gradient(pair, alpha[i] * beta[i] * (static_cast<S>(sum) + source.grad_difference(pair)));
    }
  }
}

#ifndef __CUDACC_RTC__

template <class T, int V, class Source>
void launch_interpolate_forward(InterpolateForward p, int64_t batch, const Source& source, void* stream) {
  const int64_t tile = kForwardTokens * kInterpolateWarps;
  p.pairs = static_cast<unsigned>(p.frames / 2);
  p.tiles = static_cast<unsigned>((p.tokens + tile - 1) / tile);
  const Launch how{"interpolate_forward_kernel", batch * p.pairs * p.tiles, 32 * kInterpolateWarps, 0, stream,
                   32 * kInterpolateWarps};
  launch(interpolate_forward_kernel<T, V, Source>, how, p, source);
}

// frames, tokens, dim, x, x_strides, position and z of p are given.
template <class T, class Source>
void interpolate_forward(const InterpolateForward& p, int64_t batch, const Source& source, void* stream) {
  if (whole_vectors<T>(p.dim, p.x_strides, p.position, p.x, p.z))
    launch_interpolate_forward<T, 16 / sizeof(T)>(p, batch, source, stream);
  else
    launch_interpolate_forward<T, 1>(p, batch, source, stream);
}

template <class T, int V, class Source>
void launch_interpolate_backward(InterpolateBackward p, int64_t batch, const Source& source, void* stream) {
  p.pairs = static_cast<unsigned>(p.frames / 2);
  if (p.tiles == 0) return;  // no tokens
  const int64_t most = kBackwardTokens * kInterpolateWarps;
  p.tile_tokens = static_cast<unsigned>((p.tokens + p.tiles - 1) / p.tiles);
  if (p.tile_tokens > most) throw std::invalid_argument("inti_kernels: interpolate_backward: too few tiles");
  const int shared = p.partials ? 2 * kInterpolateWarps * 2 * 32 * V * static_cast<int>(sizeof(Wide<T>)) : 0;
  const Launch how{"interpolate_backward_kernel", batch * p.pairs * p.tiles, 32 * kInterpolateWarps, shared, stream,
                   32 * kInterpolateWarps};
  launch(interpolate_backward_kernel<T, V, Source>, how, p, source);
}

// frames, tokens, dim, x, position, grad_z, their strides, grad_x, accumulate and partials of p are given.
// grad_position: wide [frames, dim], or null; what `sums` will write.
template <class T, class Source>
void interpolate_backward(InterpolateBackward p, int64_t batch, void* grad_position, const Source& source,
                          SumList& sums, void* stream) {
  p.tiles = static_cast<unsigned>(pair_interpolate_tiles(batch, p.frames, p.tokens));
  if (whole_vectors<T>(p.dim, p.x_strides, p.position, p.x, p.grad_z, p.grad_x, p.partials) &&
      divides(16 / sizeof(T), p.grad_z_strides))
    launch_interpolate_backward<T, 16 / sizeof(T)>(p, batch, source, stream);
  else
    launch_interpolate_backward<T, 1>(p, batch, source, stream);
  sums.add_wide(grad_position, p.partials, batch * p.tiles, p.frames * p.dim);
}

#endif  // __CUDACC_RTC__

}  // namespace inti::cuda
