// The frame level's two LayerNorms, of a few rows: a warp has a row, which it reads once more for each step, from the
// first cache, and a number a lane at a time: 16 to 1000 rows leave nothing to gain by wide accesses.
#pragma once

#include "column_sums.h"
#include "gelu.h"
#include "inti/device.h"

namespace inti::cuda {

constexpr int kRowWarps = 4;  // of a block, with a row each
constexpr int kSumWarps = 8;  // of a block, which share the rows that it sums over

// The class tokens with their position, a row a frame.
template <class W>
struct ClassTokens {
  const void* x;  // [batch, frames, columns], strides
  DType dtype;
  Strides strides;
  const W* position;  // [frames, columns], or null
  int frames, columns;
  W* grad;  // [batch·frames, columns]
  bool accumulate;

  struct Row {
    const ClassTokens& in;
    int64_t at, position, grad;
    __device__ __forceinline__ W operator()(int column) const {
      const W value = read<W>(in.x, in.dtype, at + column);
      return in.position ? value + load(in.position + position + column) : value;
    }
    // Of what operator() gives.
    __device__ __forceinline__ void store_gradient(int column, W value) const {
      W* const to = in.grad + grad + column;
      store(to, in.accumulate ? load(to) + value : value);
    }
  };
  __device__ __forceinline__ Row row(int64_t row) const {
    const int64_t clip = row / frames, frame = row % frames;
    return {*this, clip * strides.batch + frame * strides.frame, frame * columns, row * columns};
  }
};

// GELU of the frames' preactivation, a row a pair.
template <class T>
struct Halves {
  using W = Wide<T>;
  const T* preactivation;  // [batch·frames/2, columns]
  int columns;
  T* grad;  // the same

  struct Row {
    const T* preactivation;
    T* grad;
    __device__ __forceinline__ W operator()(int column) const { return gelu(widen(load(preactivation + column))); }
    __device__ __forceinline__ void store_gradient(int column, W value) const {
      store(grad + column, narrow<T>(value * Gelu<W>(widen(load(preactivation + column))).slope));
    }
  };
  __device__ __forceinline__ Row row(int64_t row) const {
    return {preactivation + row * columns, grad + row * columns};
  }
};

template <class T, class Source>
struct NormOfRows {
  Source in;
  int64_t rows;
  const T *weight, *bias;  // [columns]
  Wide<T> eps;
  T* normalized;             // [rows, columns]
  const T* grad_normalized;  // [rows, columns], backward
  Wide<T>* statistics;       // [rows, 2], backward
};

template <class W>
__device__ __forceinline__ W over_warp(W sum) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  return sum;
}

// Mean and 1/√(variance + eps) of a warp's row.
template <class W>
struct RowStatistics {
  W mean, scale;
  template <class Row>
  __device__ __forceinline__ RowStatistics(const Row& row, int columns, W eps) {
    const int lane = threadIdx.x % 32;
    W sum = 0, squares = 0;
    for (int c = lane; c < columns; c += 32) sum += row(c);
    mean = over_warp(sum) / columns;
    for (int c = lane; c < columns; c += 32) {
      const W from_mean = row(c) - mean;
      squares += from_mean * from_mean;
    }
    scale = inverse_root(over_warp(squares) / columns + eps);
  }
};

template <class T, class Source>
__device__ __forceinline__ void store_normalized(const NormOfRows<T, Source>& p, int64_t row, int column,
                                                 Wide<T> normal) {
  store(p.normalized + row * p.in.columns + column,
        narrow<T>(normal * widen(load(p.weight + column)) + widen(load(p.bias + column))));
}

template <class T, class Source>
__global__ void __launch_bounds__(32 * kRowWarps, sizeof(T) == 8 ? 4 : 8)
    class_levels_normalize_kernel(const NormOfRows<T, Source> p) {
  const int64_t row = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / 32;
  if (row >= p.rows) return;
  const auto at = p.in.row(row);
  const RowStatistics<Wide<T>> of(at, p.in.columns, p.eps);
  for (int c = threadIdx.x % 32; c < p.in.columns; c += 32) store_normalized(p, row, c, (at(c) - of.mean) * of.scale);
}

template <class T, class Source>
__global__ void __launch_bounds__(32 * kRowWarps, sizeof(T) == 8 ? 4 : 8)
    class_levels_backward_norm_kernel(const NormOfRows<T, Source> p) {
  using W = Wide<T>;
  const int64_t row = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / 32;
  if (row >= p.rows) return;
  const int lane = threadIdx.x % 32, columns = p.in.columns;
  const T* grad = p.grad_normalized + row * columns;
  const auto at = p.in.row(row);
  const RowStatistics<W> of(at, columns, p.eps);
  W over_dim = 0, along = 0;
  for (int c = lane; c < columns; c += 32) {
    const W normal = (at(c) - of.mean) * of.scale, g = widen(load(grad + c)) * widen(load(p.weight + c));
    over_dim += g;
    along += g * normal;
    store_normalized(p, row, c, normal);
  }
  over_dim = over_warp(over_dim) / columns;
  along = over_warp(along) / columns;
  for (int c = lane; c < columns; c += 32) {
    const W normal = (at(c) - of.mean) * of.scale, g = widen(load(grad + c)) * widen(load(p.weight + c));
    at.store_gradient(c, of.scale * (g - over_dim - normal * along));
  }
  if (lane == 0) store(p.statistics + 2 * row, Vec<W, 2>{{of.mean, of.scale}});
}

// --- Sums over the rows ----------------------------------------------------------------------------------------------

// What one LayerNorm's parameters get.
template <class T>
struct NormGradients {
  T *weight, *bias;
};

template <class T>
struct LevelSums {
  NormOfRows<T, ClassTokens<Wide<T>>> frames;
  NormOfRows<T, Halves<T>> pairs;
  NormGradients<T> of_frames, of_pairs;
  const T* grad_preactivation;  // [frames.rows, half]
  T* grad_bias;                 // [half]
  int half;
};

constexpr int kSumRun = 16;  // rows of a warp that are added up before their sum is added to the others'

// to(which, column, sum) for a block's 32 columns; add(row, column, sums) has added each row's part. A chain of all
// rows, which a large batch has thousands of, would round more than PyTorch's sums do.
template <class W, int SUMS, class Add, class Store>
__device__ __forceinline__ void sum_over_rows(int64_t rows, int columns, int tile, Add add, Store to) {
  const int column = tile * 32 + threadIdx.x % 32;
  Vec<W, 1> sums[SUMS]{};
  if (column < columns)
    for (int64_t first = threadIdx.x / 32; first < rows; first += kSumWarps * kSumRun) {
      Vec<W, 1> run[SUMS]{};
#pragma unroll 4
      for (int n = 0; n < kSumRun; ++n)
        if (first + n * kSumWarps < rows) add(first + n * kSumWarps, column, run);
#pragma unroll
      for (int i = 0; i < SUMS; ++i) sums[i][0] += run[i][0];
    }
  sum_over_warps<kSumWarps>(dynamic_shared<W>(0), sums, [&](int which, int at, const Vec<W, 1>& total) {
    if (tile * 32 + at < columns) to(which, tile * 32 + at, total[0]);
  });
}

template <class T, class Source>
__device__ __forceinline__ void norm_gradients(const NormOfRows<T, Source>& p, const NormGradients<T>& of, int tile) {
  using W = Wide<T>;
  sum_over_rows<W, 2>(
      p.rows, p.in.columns, tile,
      [&](int64_t row, int column, Vec<W, 1>(&sums)[2]) {
        const auto statistics = load<2>(p.statistics + 2 * row);
        const W g = widen(load(p.grad_normalized + row * p.in.columns + column));
        sums[0][0] += g * ((p.in.row(row)(column) - statistics[0]) * statistics[1]);
        sums[1][0] += g;
      },
      [&](int which, int column, W total) { store((which ? of.bias : of.weight) + column, narrow<T>(total)); });
}

// Blocks of 32 columns each: first of the frames' LayerNorm, then of the pairs', then of the frames' bias.
template <class T>
__global__ void __launch_bounds__(32 * kSumWarps, sizeof(T) == 8 ? 2 : 4)
    class_levels_backward_sums_kernel(const LevelSums<T> p) {
  using W = Wide<T>;
  int tile = blockIdx.x;
  const int of_frames = (p.frames.in.columns + 31) / 32, of_pairs = (p.pairs.in.columns + 31) / 32;
  if (tile < of_frames) return norm_gradients(p.frames, p.of_frames, tile);
  tile -= of_frames;
  if (tile < of_pairs) return norm_gradients(p.pairs, p.of_pairs, tile);
  sum_over_rows<W, 1>(
      p.frames.rows, p.half, tile - of_pairs,
      [&](int64_t row, int column, Vec<W, 1>(&sums)[1]) {
        sums[0][0] += widen(load(p.grad_preactivation + row * p.half + column));
      },
      [&](int, int column, W total) { store(p.grad_bias + column, narrow<T>(total)); });
}

}  // namespace inti::cuda
