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
  int64_t grad_pitch;      // from token to token
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
  const T* grad_features = p.grad_features + pair * p.grad_pitch + tile.frame % 2 * p.width + column;

  Vec<W, V> sums[1]{};
  if (column < p.width) {
    for (int first = warp; first < tile.count; first += kWarps * kInFlight) {
      Vec<T, V> before[kInFlight], grads[kInFlight];  // [V] of each token
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t token = first + i * kWarps;
        if (token >= tile.count) break;
        before[i] = load<V>(preactivation + token * p.width);
        grads[i] = load<V>(grad_features + token * p.grad_pitch);
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

constexpr int kNormWarps = 4;  // of a block, and rows that it has at once

template <class T>
struct NormBackward {
  TokenRows<T> in;
  TokenTiles cut;
  unsigned column_tiles;
  int slab;                    // columns of a block: all, if its shared memory holds as many
  const T* norm_weight;        // [dim]
  const Wide<T>* statistics;   // [rows, 2]
  const T* grad_normalized;    // [rows, dim]
  T* grad_x;                   // [rows, dim], or null
  bool accumulate;             // to grad_x, which there is then
  Wide<T>* total;              // [rows, dim], to which all is added in grad_x's place
  Wide<T>* norm_partials;      // [tiles, 2, dim], or null: the weight's, the bias's
  Wide<T>* position_partials;  // [batch, tiles of a frame, frames, dim], or null
};

// What a row's gradient needs: x̂ = (x - mean)·scale; grad_x = scale·(g - over_dim - x̂·along), g = grad·norm_weight,
// over_dim and along the means of g and of g·x̂.
constexpr int kRowTerms = 4;  // mean, scale, over_dim, along

// A block's shared memory, in this order: the rows' terms [kNormWarps, kRowTerms], wide; the sums over the tile's rows,
// wide, `slab` of each of the three; the rows of x and then those of the gradient [kNormWarps, slab].
template <class T>
constexpr int kNormTermBytes = kNormWarps * kRowTerms * static_cast<int>(sizeof(Wide<T>));
template <class T>
constexpr int kNormSumBytes = 3 * static_cast<int>(sizeof(Wide<T>));  // of a column
template <class T>
constexpr int kNormColumnBytes = kNormSumBytes<T> + 2 * kNormWarps * static_cast<int>(sizeof(T));
constexpr int kNormSharedBytes = 64 * 1024;  // at most: what Turing has for a block

// A warp's row: the two means over all channels, to shared memory, and the row itself as far as it lies in the block's
// columns.
template <class T, int V>
__device__ __forceinline__ void norm_backward_row(const NormBackward<T>& p, const T* x, const T* grad,
                                                  const Wide<T>* position, Vec<Wide<T>, 2> statistics, Shared<T> kept,
                                                  int first_column) {
  using W = Wide<T>;
  constexpr int kLoads = 4;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  W over_dim = 0, along = 0;
  for (int base = lane * V; base < p.in.dim; base += 32 * V * kLoads) {
    Loaded<T, V> runs[kLoads], grads[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int channel = base + i * 32 * V;
      if (channel >= p.in.dim) break;
      runs[i] = start_load<V>(x + channel);
      grads[i] = start_load<V>(grad + channel);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int channel = base + i * 32 * V;
      if (channel >= p.in.dim) break;
      auto run = widen(runs[i].numbers());
      const auto g = widen(grads[i].numbers()), weight = widen(load<V>(p.norm_weight + channel));
      const int column = channel - first_column;
      if (column >= 0 && column < p.slab) {
        store(kept + (warp * p.slab + column), runs[i].numbers());
        store(kept + ((kNormWarps + warp) * p.slab + column), grads[i].numbers());
      }
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
    const Shared<W> to = dynamic_shared<W>(0) + kRowTerms * warp;
    store(to, statistics);
    store(to + 2, Vec<W, 2>{{over_dim / p.in.dim, along / p.in.dim}});
  }
}

// The columns' sums in shared memory. A vector of columns is one thread's from beginning to end; of the vectors' three
// sums in turn 16 bytes lie side by side, so that there are no bank conflicts.
template <class W, int V>
struct NormSums {
  static constexpr int G = kExchanged<W, V>;
  Shared<W> at;
  int slab;

  // Calls f(which sum, elements from which on, place in shared memory) for each 16 bytes of a vector's sums.
  template <class F>
  __device__ __forceinline__ void each(int column, F f) const {
#pragma unroll
    for (int i = 0; i < 3 * V; i += G) f(i / V, i % V, at + (i / G * (slab / V) + column / V) * G);
  }
};

// A thread's columns of the rows that wait in shared memory: their gradients, and the sums over the rows. TOTAL: there
// is one.
template <class T, int V, bool TOTAL>
__device__ __forceinline__ void norm_backward_columns(const NormBackward<T>& p, int64_t row, int rows,
                                                      const Wide<T>* position, Shared<T> kept,
                                                      NormSums<Wide<T>, V> summed, int first_column, int column) {
  using W = Wide<T>;
  constexpr int G = NormSums<W, V>::G;
  const Shared<W> terms = dynamic_shared<W>(0);
  const int channel = first_column + column;
  T* to = p.grad_x + row * p.in.dim + channel;
  Loaded<T, V> old;  // grad_x's next row, under way
  if (p.accumulate) old = start_load<V>(to);
  Vec<W, V> sums[3];  // norm weight's, norm bias's, position's
  summed.each(column, [&](int which, int from, Shared<W> at) {
    const auto part = load<G>(at);
#pragma unroll
    for (int k = 0; k < G; ++k) sums[which][from + k] = part[k];
  });
  const auto weight = widen(load<V>(p.norm_weight + channel));
  Vec<W, V> moved{};
  if (position) moved = load_wide<V>(position + channel);
#pragma unroll 1  // rows side by side would take more registers than there are
  for (int r = 0; r < rows; ++r) {
    const auto start = load<2>(terms + kRowTerms * r), means = load<2>(terms + (kRowTerms * r + 2));
    const auto run = widen(load<V>(kept + (r * p.slab + column)));
    const auto g = widen(load<V>(kept + ((kNormWarps + r) * p.slab + column)));
    Vec<W, V> grad_row;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const W normal = (run[k] + moved[k] - start[0]) * start[1];
      grad_row[k] = start[1] * (g[k] * weight[k] - means[0] - normal * means[1]);
      sums[0][k] += g[k] * normal;
      sums[1][k] += g[k];
      sums[2][k] += grad_row[k];
    }
    if (p.accumulate) {
      const auto before = widen(old.numbers());
      if (r + 1 < rows) old = start_load<V>(to + p.in.dim);
#pragma unroll
      for (int k = 0; k < V; ++k) grad_row[k] += before[k];
    }
    if constexpr (TOTAL) {
      W* const sum = p.total + (row + r) * p.in.dim + channel;
      const auto before = load_wide<V>(sum);
#pragma unroll
      for (int k = 0; k < V; ++k) grad_row[k] += before[k];
      store_some(sum, grad_row, V, true);
    } else if (p.grad_x) {
      store(to, narrow<T>(grad_row));
    }
    to += p.in.dim;
  }
  summed.each(column, [&](int which, int from, Shared<W> at) {
    Vec<W, G> part;
#pragma unroll
    for (int k = 0; k < G; ++k) part[k] = sums[which][from + k];
    store(at, part);
  });
}

// A tile, a few rows at a time: first a warp a row, for the row's means, then a thread a vector of columns, which goes
// over the rows. In between they wait in shared memory, so that x and the gradient are read from memory once.
// 128 threads, 4 blocks an SM (128 registers; at 768 channels of float16 21 KiB of its shared memory): 16 warps · 32 ·
// 96 bytes = 48 KiB in flight.
template <class T, int V, bool TOTAL>
__global__ void __launch_bounds__(32 * kNormWarps, 4) token_features_backward_norm_kernel(const NormBackward<T> p) {
  using W = Wide<T>;
  using Sums = NormSums<W, V>;
  const TileOfTokens tile(p.cut, p.in.tokens, p.column_tiles);
  const int first_column = tile.columns * p.slab, left = p.in.dim - first_column;
  const int columns = left < p.slab ? left : p.slab;
  const unsigned clip = tile.frame / p.in.frames, frame = tile.frame % p.in.frames;
  const W* position = p.in.position ? p.in.position + static_cast<int64_t>(frame) * p.in.dim : nullptr;
  const Sums summed{dynamic_shared<W>(kNormTermBytes<T>), p.slab};
  const Shared<T> kept = dynamic_shared<T>(kNormTermBytes<T> + kNormSumBytes<T> * p.slab);
  for (int column = threadIdx.x * V; column < columns; column += 32 * kNormWarps * V)
    summed.each(column, [](int, int, Shared<W> at) { store(at, Vec<W, Sums::G>{}); });

  for (int first = 0; first < tile.count; first += kNormWarps) {
    const int64_t row = static_cast<int64_t>(tile.frame) * p.in.tokens + (tile.first + first);
    const int left_over = tile.count - first, rows = left_over < kNormWarps ? left_over : kNormWarps;
    const int warp = threadIdx.x / 32;
    if (warp < rows)
      norm_backward_row<T, V>(p, p.in.at(clip, frame, tile.first + first + warp),
                              p.grad_normalized + (row + warp) * p.in.dim, position,
                              load<2>(p.statistics + 2 * (row + warp)), kept, first_column);
    __syncthreads();
    for (int column = threadIdx.x * V; column < columns; column += 32 * kNormWarps * V)
      norm_backward_columns<T, V, TOTAL>(p, row, rows, position, kept, summed, first_column, column);
    __syncthreads();  // before others' rows take the place of these
  }

  const int64_t position_row = (clip * int64_t{p.cut.tiles} + tile.tile % p.cut.tiles) * p.in.frames + frame;
  for (int column = threadIdx.x * V; column < columns; column += 32 * kNormWarps * V)
    summed.each(column, [&](int which, int from, Shared<W> at) {
      const int channel = first_column + column + from;
      if (which == 2) {
        if (p.position_partials) store(p.position_partials + position_row * p.in.dim + channel, load<Sums::G>(at));
      } else if (p.norm_partials) {
        store(p.norm_partials + (2 * int64_t{tile.tile} + which) * p.in.dim + channel, load<Sums::G>(at));
      }
    });
}

}  // namespace inti::cuda
