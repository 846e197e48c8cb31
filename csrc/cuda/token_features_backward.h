// token_features' kernels of the backward, which sum over tiles of tokens: GELU and the Linear's bias; the LayerNorm's
// output once more; LayerNorm and position.
#pragma once

#include "column_sums.h"
#include "gelu.h"
#include "token_rows.h"
#include "vectors.h"

namespace inti::cuda {

constexpr int kWarps = 4;     // of the backward's blocks; they share a tile's tokens
constexpr int kInFlight = 4;  // tokens of a warp that are loaded at once

template <class T>
struct ActivationBackward {
  int tokens, width;
  TokenTiles cut;
  unsigned column_tiles;
  const T* grad_features;  // [frames / 2, tokens, 2 · width]; frames of all clips
  const T* preactivation;  // [frames, tokens, width]
  T* grad_preactivation;   // [frames, tokens, width]
  Wide<T>* partials;       // [tiles, width], or null
};

// grad_preactivation = grad_features · GELU'(preactivation), and its sums over a tile's tokens.
// 128 threads, 5 blocks an SM (96 registers): 20 warps · 32 · 128 bytes = 80 KiB in flight. Fewer in float64, whose erf
// and exp take more registers.
template <class T, int V>
__global__ void __launch_bounds__(32 * kWarps, sizeof(T) == 8 ? 3 : 5)
    token_features_backward_activation_kernel(const ActivationBackward<T> p) {
  using W = Wide<T>;
  const TileOfTokens tile(p.cut, p.tokens, p.column_tiles);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_column = tile.columns * 32 * V, column = first_column + lane * V;
  const int64_t row = static_cast<int64_t>(tile.frame) * p.tokens + tile.first;
  const int64_t pair = static_cast<int64_t>(tile.frame / 2) * p.tokens + tile.first;
  const T* preactivation = p.preactivation + row * p.width + column;
  T* grad_preactivation = p.grad_preactivation + row * p.width + column;
  const T* grad_features = p.grad_features + (2 * pair + tile.frame % 2) * p.width + column;

  Vec<W, V> sums[1]{};
  if (column < p.width) {
    for (int first = warp; first < tile.count; first += kWarps * kInFlight) {
      Vec<T, V> before[kInFlight], grads[kInFlight];  // [V] of each token
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t token = first + i * kWarps;
        if (token >= tile.count) break;
        before[i] = load<V>(preactivation + token * p.width);
        grads[i] = load<V>(grad_features + token * 2 * p.width);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t token = first + i * kWarps;
        if (token >= tile.count) break;
        const auto at = widen(before[i]);
        auto grad = widen(grads[i]);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          grad[k] *= Gelu<W>(at[k]).slope;
          sums[0][k] += grad[k];
        }
        store(grad_preactivation + token * p.width, narrow<T>(grad));
      }
    }
  }
  if (!p.partials) return;
  W* partials = p.partials + static_cast<int64_t>(tile.tile) * p.width + first_column;
  const int columns = p.width - first_column;
  sum_over_warps<kWarps>(dynamic_shared<W>(0), sums, [&](int, int at, const Vec<W, kExchanged<W, V>>& total) {
    if (at < columns) store(partials + at, total);
  });
}

template <class T>
struct Normalize {
  TokenRows<T> in;
  TokenTiles cut;
  unsigned column_tiles;
  const T* norm_weight;       // [dim]
  const T* norm_bias;         // [dim]
  const Wide<T>* statistics;  // [rows, 2]
  T* normalized;              // [rows, dim]
};

// The LayerNorm's output. A lane's channels stay the same over the tile's tokens, so that weight, bias and position are
// read once. 128 threads, 6 blocks an SM (80 registers): 24 warps · 32 · 64 bytes = 48 KiB in flight.
template <class T, int V>
__global__ void __launch_bounds__(32 * kWarps, 6) token_features_normalize_kernel(const Normalize<T> p) {
  using W = Wide<T>;
  const TileOfTokens tile(p.cut, p.in.tokens, p.column_tiles);
  const int channel = (tile.columns * 32 + threadIdx.x % 32) * V;
  if (channel >= p.in.dim) return;
  const unsigned clip = tile.frame / p.in.frames, frame = tile.frame % p.in.frames;
  const int64_t row = static_cast<int64_t>(tile.frame) * p.in.tokens + tile.first;
  const T* x = p.in.at(clip, frame, tile.first) + channel;
  const auto weight = widen(load<V>(p.norm_weight + channel)), bias = widen(load<V>(p.norm_bias + channel));
  Vec<W, V> position{};
  if (p.in.position) position = load_wide<V>(p.in.position + static_cast<int64_t>(frame) * p.in.dim + channel);

  for (int first = threadIdx.x / 32; first < tile.count; first += kWarps * kInFlight) {
    Vec<T, V> runs[kInFlight];
    Vec<W, 2> statistics[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t token = first + i * kWarps;
      if (token >= tile.count) break;
      runs[i] = load<V>(x + token * p.in.strides.token);
      statistics[i] = load<2>(p.statistics + 2 * (row + token));
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t token = first + i * kWarps;
      if (token >= tile.count) break;
      auto run = widen(runs[i]);
#pragma unroll
      for (int k = 0; k < V; ++k)
        run[k] = (run[k] + position[k] - statistics[i][0]) * statistics[i][1] * weight[k] + bias[k];
      store(p.normalized + (row + token) * p.in.dim + channel, narrow<T>(run));
    }
  }
}

template <class T>
struct NormBackward {
  TokenRows<T> in;
  TokenTiles cut;
  const T* norm_weight;       // [dim]
  const Wide<T>* statistics;  // [rows, 2]
  const T* grad_normalized;   // [rows, dim]
  T* grad_x;                  // [rows, dim], or null
  bool accumulate;
  Wide<T>* norm_partials;      // [tiles, 2, dim], or null: the weight's, the bias's
  Wide<T>* position_partials;  // [batch, tiles of a frame, frames, dim], or null
};

// What a row's gradient needs: x̂ = (x - mean)·scale; grad_x = scale·(g - over_dim - x̂·along), g = grad·norm_weight.
template <class W>
struct RowTerms {
  W mean, scale, over_dim, along;  // the mean of g, and of g·x̂
};

// Each warp's rows: mean of g and of g·x̂ over the channels, to shared memory [tile's tokens, 4].
template <class T, int V>
__device__ __forceinline__ void norm_backward_rows(const NormBackward<T>& p, const TileOfTokens& tile, const T* x,
                                                   const T* grad, const Wide<T>* position, int64_t row) {
  using W = Wide<T>;
  constexpr int kLoads = 3;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int token = warp; token < tile.count; token += kWarps) {
    const auto statistics = load<2>(p.statistics + 2 * (row + token));
    W over_dim = 0, along = 0;
    for (int base = lane * V; base < p.in.dim; base += 32 * V * kLoads) {
      Vec<T, V> runs[kLoads], grads[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int channel = base + i * 32 * V;
        if (channel >= p.in.dim) break;
        runs[i] = load<V>(x + token * p.in.strides.token + channel);
        grads[i] = load<V>(grad + static_cast<int64_t>(token) * p.in.dim + channel);
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int channel = base + i * 32 * V;
        if (channel >= p.in.dim) break;
        auto run = widen(runs[i]);
        const auto g = widen(grads[i]), weight = widen(load<V>(p.norm_weight + channel));
        if (position) {
          const auto moved = load_wide<V>(position + channel);
#pragma unroll
          for (int k = 0; k < V; ++k) run[k] += moved[k];
        }
#pragma unroll
        for (int k = 0; k < V; ++k) {
          over_dim += g[k] * weight[k];
          along += g[k] * weight[k] * ((run[k] - statistics[0]) * statistics[1]);
        }
      }
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      over_dim += __shfl_xor_sync(0xffffffffu, over_dim, distance);
      along += __shfl_xor_sync(0xffffffffu, along, distance);
    }
    if (lane == 0) {
      const Shared<W> to = dynamic_shared<W>(0) + 4 * token;
      store(to, Vec<W, 2>{{statistics[0], statistics[1]}});
      store(to + 2, Vec<W, 2>{{over_dim / p.in.dim, along / p.in.dim}});
    }
  }
}

// A tile twice: a warp a row for the rows' sums, then channels outside and rows inside, so that the parameters' sums
// over the tile's rows stay in registers. The second time the tile, about 90 KB, comes from the L2 cache, where that
// holds the tiles of all blocks that run together: V100's 6 MiB don't, and x and the gradient are read from memory
// twice. 128 threads, 3 blocks an SM (168 registers): 12 warps · 32 · 128 bytes = 48 KiB in flight.
template <class T, int V>
__global__ void __launch_bounds__(32 * kWarps, 3) token_features_backward_norm_kernel(const NormBackward<T> p) {
  using W = Wide<T>;
  constexpr int kTerms = 4 * kTileTokens;  // wide numbers: the rows' terms, before the sums
  constexpr int kBuffer = kColumnSumBytes<W, V, 3, kWarps> / sizeof(W);  // two in turn, so that a step has one barrier
  const TileOfTokens tile(p.cut, p.in.tokens, 1);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned clip = tile.frame / p.in.frames, frame = tile.frame % p.in.frames;
  const int64_t row = static_cast<int64_t>(tile.frame) * p.in.tokens + tile.first, dim = p.in.dim;
  const T* x = p.in.at(clip, frame, tile.first);
  const T* grad = p.grad_normalized + row * dim;
  const W* position = p.in.position ? p.in.position + frame * dim : nullptr;
  norm_backward_rows<T, V>(p, tile, x, grad, position, row);
  __syncthreads();

  const int64_t tile_in_frame = tile.tile % p.cut.tiles;
  const int64_t position_row = (clip * int64_t{p.cut.tiles} + tile_in_frame) * p.in.frames + frame;
  int step = 0;
  for (int base = 0; base < p.in.dim; base += 32 * V, ++step) {
    const int channel = base + lane * V;
    Vec<W, V> sums[3]{};  // norm weight's, norm bias's, position's
    if (channel < p.in.dim) {
      const auto weight = widen(load<V>(p.norm_weight + channel));
      Vec<W, V> moved{};
      if (position) moved = load_wide<V>(position + channel);
      for (int first = warp; first < tile.count; first += kWarps * kInFlight) {
        Vec<T, V> runs[kInFlight], grads[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          const int64_t token = first + i * kWarps;
          if (token >= tile.count) break;
          runs[i] = load<V>(x + token * p.in.strides.token + channel);
          grads[i] = load<V>(grad + token * dim + channel);
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          const int token = first + i * kWarps;
          if (token >= tile.count) break;
          const auto start = load<2>(dynamic_shared<W>(0) + 4 * token);
          const auto means = load<2>(dynamic_shared<W>(0) + (4 * token + 2));
          const auto run = widen(runs[i]), g = widen(grads[i]);
          Vec<W, V> grad_row;
#pragma unroll
          for (int k = 0; k < V; ++k) {
            const W normal = (run[k] + moved[k] - start[0]) * start[1];
            grad_row[k] = start[1] * (g[k] * weight[k] - means[0] - normal * means[1]);
            sums[0][k] += g[k] * normal;
            sums[1][k] += g[k];
            sums[2][k] += grad_row[k];
          }
          if (p.grad_x) {
            T* to = p.grad_x + (row + token) * dim + channel;
            if (p.accumulate) {
              const auto old = widen(load<V>(to));
#pragma unroll
              for (int k = 0; k < V; ++k) grad_row[k] += old[k];
            }
            store(to, narrow<T>(grad_row));
          }
        }
      }
    }
    if (!p.norm_partials && !p.position_partials) continue;
    const Shared<W> buffer = dynamic_shared<W>(0) + (kTerms + step % 2 * kBuffer);
    sum_over_warps<kWarps>(buffer, sums, [&](int which, int at, const Vec<W, kExchanged<W, V>>& total) {
      if (base + at >= p.in.dim) return;
      if (which < 2) {
        if (p.norm_partials) store(p.norm_partials + (2 * int64_t{tile.tile} + which) * dim + (base + at), total);
      } else if (p.position_partials) {
        store(p.position_partials + position_row * dim + (base + at), total);
      }
    });
  }
}

}  // namespace inti::cuda
