// token_features: LayerNorm → Linear → GELU of every token, written as concatenated pairs; and back. The kernels of the
// backward are token_features_backward.h's.
#include "inti/cuda/token_features.h"

#include "gelu.h"
#include "gemm.h"
#include "moments.h"
#include "partial_sums.h"
#include "token_features_backward.h"
#include "token_rows.h"

namespace inti::cuda {

// --- Forward ---------------------------------------------------------------------------------------------------------

template <class T>
struct TokenFeaturesStatistics {
  TokenRows<T> in;
  int rows;
  Wide<T> eps;
  Wide<T>* statistics;  // [rows, 2]
};

constexpr int kStatisticsRows = 4;  // of a block, a warp each

// Mean and 1/√(variance + eps) of every row, in one pass over memory: four 16-byte loads a thread are in flight.
// 128 threads, 8 blocks an SM (64 registers): 32 warps · 32 · 48 bytes (768 channels of float16) = 48 KiB in flight.
template <class T, int V>
__global__ void __launch_bounds__(32 * kStatisticsRows, 8)
    token_features_statistics_kernel(const TokenFeaturesStatistics<T> p) {
  using W = Wide<T>;
  constexpr int kLoads = 4;
  const unsigned row = blockIdx.x * kStatisticsRows + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= static_cast<unsigned>(p.rows)) return;
  const RowPlace place(row, p.in.tokens);
  const unsigned clip = place.frame / p.in.frames, frame = place.frame % p.in.frames;
  const T* x = p.in.at(clip, frame, place.token);
  const W* position = p.in.position ? p.in.position + static_cast<int64_t>(frame) * p.in.dim : nullptr;

  Moments<W> moments;
  for (int base = lane * V; base < p.in.dim; base += 32 * V * kLoads) {
    Vec<T, V> runs[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      if (base + i * 32 * V < p.in.dim) runs[i] = load<V>(x + base + i * 32 * V);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int channel = base + i * 32 * V;
      if (channel >= p.in.dim) break;
      auto run = widen(runs[i]);
      if (position) {
        const auto moved = load_wide<V>(position + channel);
#pragma unroll
        for (int k = 0; k < V; ++k) run[k] += moved[k];
      }
      moments.add(run);
    }
  }
  moments.over_warp();
  if (lane == 0)
    store(p.statistics + 2 * static_cast<int64_t>(row),
          Vec<W, 2>{{moments.mean, inverse_root(moments.variance() + p.eps)}});
}

template <class T, int V>
struct TokenFeaturesGemm {
  using Element = T;
  using W = Wide<T>;
  static constexpr int kVector = V, kSources = 1;
  static constexpr bool kReduces = false;

  TokenRows<T> in;
  const T* norm_weight;  // [dim]
  const T* norm_bias;    // [dim]
  const W* statistics;   // [rows, 2]
  const T* weight;       // [columns, dim]
  const T* bias;         // [columns]
  T* features;           // [rows / 2 in pairs of frames, 2 · columns]
  T* preactivation;      // [rows, columns], or null
  int rows, columns, pitch;
  bool vectors;  // whether features and preactivation can be written 16 bytes at a time

  __device__ __forceinline__ int extent(int) const { return in.dim; }

  // The LayerNorm's output. Its parameters and the position, which are small and the same for many blocks, are read
  // when they are needed: registers are dearer than the first level cache's latency.
  template <int COUNT>
  struct Rows {
    static constexpr int N = 16 / sizeof(T);
    const T* x[COUNT];
    int channel, position[COUNT];  // the step's elements of the parameters, and of the position
    W mean[COUNT], scale[COUNT];
    Packed<T> runs[COUNT];

    __device__ __forceinline__ Rows(const TokenFeaturesGemm& p, const int (&row)[COUNT], int offset) : channel(offset) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const RowPlace place(row[i], p.in.tokens);
        const unsigned clip = place.frame / p.in.frames, frame = place.frame % p.in.frames;
        x[i] = p.in.at(clip, frame, place.token) + offset;
        position[i] = frame * p.in.dim + offset;
        const auto statistics = load<2>(p.statistics + 2 * static_cast<int64_t>(row[i]));
        mean[i] = statistics[0];
        scale[i] = statistics[1];
      }
    }
    __device__ __forceinline__ void fetch(const TokenFeaturesGemm&) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) runs[i] = load_packed<V>(x[i]);
    }
    __device__ __forceinline__ void fetch(const TokenFeaturesGemm&, int left) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) runs[i] = load_packed<V>(x[i], left);
    }
    __device__ __forceinline__ void advance(int elements) {
      channel += elements;
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        x[i] += elements;
        position[i] += elements;
      }
    }
    // With weight and bias 0 from `left` on, so is the output.
    struct Late {
      Vec<W, N> position[COUNT], weight, bias;
    };
    __device__ __forceinline__ Late late(const TokenFeaturesGemm& p, bool whole, int left) const {
      Packed<T> weight, bias;
      Late result;
      if (whole) {
        weight = load_packed<V>(p.norm_weight + channel);
        bias = load_packed<V>(p.norm_bias + channel);
      } else {
        weight = load_packed<V>(p.norm_weight + channel, left);
        bias = load_packed<V>(p.norm_bias + channel, left);
      }
      result.weight = widen(weight.unpacked());
      result.bias = widen(bias.unpacked());
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        if (!p.in.position)
          result.position[i] = {};
        else
          result.position[i] = load_some<kWideStep<W, V>, N>(p.in.position + position[i], left);
      }
      return result;
    }
    template <class S>
    __device__ __forceinline__ Vec<S, N> staged(const TokenFeaturesGemm&, const Late& late, int i) const {
      Vec<W, N> run = widen(runs[i].unpacked());
#pragma unroll
      for (int k = 0; k < N; ++k)
        run[k] = (run[k] + late.position[i][k] - mean[i]) * scale[i] * late.weight[k] + late.bias[k];
      return narrow<S>(run);
    }
  };

  template <int N>
  struct Columns {
    int first, left;
    Vec<W, N> bias;
    __device__ __forceinline__ Columns(const TokenFeaturesGemm& p, int column)
        : first(column), left(p.columns - column), bias(widen(load_some<1, N>(p.bias + column, left))) {}
  };

  template <int N>
  __device__ __forceinline__ void finish(const Columns<N>& at, int row, Vec<W, N> sums) const {
    const RowPlace place(row, in.tokens);
    const int64_t pair = static_cast<int64_t>(place.frame / 2) * in.tokens + place.token;
#pragma unroll
    for (int k = 0; k < N; ++k) sums[k] += at.bias[k];
    if (preactivation)
      store_some(preactivation + static_cast<int64_t>(row) * columns + at.first, sums, at.left, vectors);
#pragma unroll
    for (int k = 0; k < N; ++k) sums[k] = gelu(sums[k]);
    store_some(features + (2 * pair + place.frame % 2) * columns + at.first, sums, at.left, vectors);
  }
};

// 128 threads, 3 blocks an SM (168 registers, 90 KiB of its shared memory): three warps a scheduler, one of which
// multiplies while others stage. 2 blocks where elements come one by one.
template <class T, int V>
__global__ void __launch_bounds__(WmmaTile::kThreads, WmmaTile::kBlocks<V>)
    token_features_wmma_kernel(const TokenFeaturesGemm<T, V> p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  wmma_gemm(p);
#else
  if constexpr (is_float16<T>)
    wmma_gemm(p);
  else
    __trap();  // uses_tensor_cores() says no
#endif
}

// 256 threads, 2 blocks an SM (128 registers).
template <class T, int V>
__global__ void __launch_bounds__(FmaTile<T>::kThreads, FmaTile<T>::kBlocks)
    token_features_fma_kernel(const TokenFeaturesGemm<T, V> p) {
  fma_gemm(p);
}

// Where the sums of norm_partials go; either may be null.
struct StoreNorm {
  void* weight;
  void* bias;
  DType dtype;
  int64_t dim;
  template <class W>
  __device__ __forceinline__ void operator()(int64_t i, W sum) const {
    if (i < dim) {
      if (weight) write(weight, dtype, i, sum);
    } else if (bias) {
      write(bias, dtype, i - dim, sum);
    }
  }
};

// --- Host ------------------------------------------------------------------------------------------------------------
#ifndef __CUDACC_RTC__

template <class T>
TokenRows<T> token_rows(const TokenFeaturesShape& shape, const void* x, const Strides& strides, const void* position) {
  counted(shape.batch * shape.frames * shape.tokens, "batch · frames · tokens");
  return {static_cast<const T*>(x),
          strides,
          static_cast<const Wide<T>*>(position),
          counted(shape.frames, "frames"),
          counted(shape.tokens, "tokens"),
          counted(shape.dim, "dim")};
}

template <class T, int V>
void launch_token_features(const TokenFeaturesForward& p) {
  const auto& s = p.shape;
  const auto in = token_rows<T>(s, p.x, p.x_strides, p.position);
  const int rows = static_cast<int>(s.batch * s.frames * s.tokens);
  auto* statistics = static_cast<Wide<T>*>(p.statistics);
  const TokenFeaturesStatistics<T> first{in, rows, static_cast<Wide<T>>(p.eps), statistics};
  const int64_t blocks = (int64_t{rows} + kStatisticsRows - 1) / kStatisticsRows;
  launch(token_features_statistics_kernel<T, V>,
         Launch{"token_features_statistics_kernel", blocks, 32 * kStatisticsRows, 0, p.stream}, first);

  TokenFeaturesGemm<T, V> second{};
  second.in = in;
  second.norm_weight = static_cast<const T*>(p.norm_weight);
  second.norm_bias = static_cast<const T*>(p.norm_bias);
  second.statistics = statistics;
  second.weight = static_cast<const T*>(p.weight);
  second.bias = static_cast<const T*>(p.bias);
  second.features = static_cast<T*>(p.features);
  second.preactivation = static_cast<T*>(p.preactivation);
  second.rows = rows;
  second.columns = counted(s.width, "width");
  counted(s.width * s.dim, "width · dim");
  second.pitch = in.dim;
  second.vectors = s.width % (16 / sizeof(T)) == 0 && all_aligned(p.features, p.preactivation);
  if constexpr (sizeof(T) == 2) {
    if (uses_tensor_cores<T>()) {
      return launch_gemm<WmmaTile>(token_features_wmma_kernel<T, V>, "token_features_wmma_kernel", second, p.stream);
    }
  }
  if constexpr (!is_float16<T>)
    launch_gemm<FmaTile<T>>(token_features_fma_kernel<T, V>, "token_features_fma_kernel", second, p.stream);
}

void token_features_forward(const TokenFeaturesForward& p) {
  const auto full_width = [&](int unit) {
    return p.shape.dim % unit == 0 && divides(unit, p.x_strides) &&
           all_aligned(p.x, p.position, p.norm_weight, p.norm_bias, p.weight);
  };
  with_vectors(p.shape.dtype, full_width,
               [&](auto number, auto unit) { launch_token_features<decltype(number), unit>(p); });
}

int64_t token_features_tiles(const TokenFeaturesShape& shape) {
  const int64_t frames = shape.batch * shape.frames;
  return frames * token_tiles(frames, shape.tokens).tiles;
}

void token_features_backward_activation(const TokenFeaturesBackwardActivation& p) {
  const auto& s = p.shape;
  const int64_t tiles = token_features_tiles(s);
  const auto full_width = [&](int unit) {
    return s.width % unit == 0 && all_aligned(p.grad_features, p.preactivation, p.grad_preactivation, p.partials);
  };
  with_vectors(s.dtype, full_width, [&](auto number, auto unit) {
    using T = decltype(number);
    using W = Wide<T>;
    ActivationBackward<T> q{};
    q.tokens = counted(s.tokens, "tokens");
    q.width = counted(s.width, "width");
    q.cut = token_tiles(s.batch * s.frames, s.tokens);
    q.column_tiles = divide_up(s.width, 32 * unit);
    q.grad_features = static_cast<const T*>(p.grad_features);
    q.preactivation = static_cast<const T*>(p.preactivation);
    q.grad_preactivation = static_cast<T*>(p.grad_preactivation);
    q.partials = p.grad_bias ? static_cast<W*>(p.partials) : nullptr;
    const int shared = q.partials ? kColumnSumBytes<W, unit, 1, kWarps> : 0;
    launch(token_features_backward_activation_kernel<T, unit>,
           Launch{"token_features_backward_activation_kernel", tiles * q.column_tiles, 32 * kWarps, shared, p.stream},
           q);
    if (p.grad_bias) sum_partials<W>(p.partials, tiles, s.width, StoreAs{p.grad_bias, s.dtype}, p.stream);
  });
}

void token_features_normalize(const TokenFeaturesNormalize& p) {
  const auto& s = p.shape;
  const auto full_width = [&](int unit) {
    return s.dim % unit == 0 && divides(unit, p.x_strides) &&
           all_aligned(p.x, p.position, p.norm_weight, p.norm_bias, p.normalized);
  };
  with_vectors(s.dtype, full_width, [&](auto number, auto unit) {
    using T = decltype(number);
    Normalize<T> q{};
    q.in = token_rows<T>(s, p.x, p.x_strides, p.position);
    q.cut = token_tiles(s.batch * s.frames, s.tokens);
    q.column_tiles = divide_up(s.dim, 32 * unit);
    q.norm_weight = static_cast<const T*>(p.norm_weight);
    q.norm_bias = static_cast<const T*>(p.norm_bias);
    q.statistics = static_cast<const Wide<T>*>(p.statistics);
    q.normalized = static_cast<T*>(p.normalized);
    const int64_t blocks = token_features_tiles(s) * q.column_tiles;
    launch(token_features_normalize_kernel<T, unit>,
           Launch{"token_features_normalize_kernel", blocks, 32 * kWarps, 0, p.stream}, q);
  });
}

void token_features_backward_norm(const TokenFeaturesBackwardNorm& p) {
  const auto& s = p.shape;
  const int64_t tiles = token_features_tiles(s);
  const bool sums_norm = p.grad_norm_weight || p.grad_norm_bias;
  const auto full_width = [&](int unit) {
    return s.dim % unit == 0 && divides(unit, p.x_strides) &&
           all_aligned(p.x, p.position, p.norm_weight, p.grad_normalized, p.grad_x, p.partials);
  };
  with_vectors(s.dtype, full_width, [&](auto number, auto unit) {
    using T = decltype(number);
    using W = Wide<T>;
    NormBackward<T> q{};
    q.in = token_rows<T>(s, p.x, p.x_strides, p.position);
    q.cut = token_tiles(s.batch * s.frames, s.tokens);
    q.norm_weight = static_cast<const T*>(p.norm_weight);
    q.statistics = static_cast<const W*>(p.statistics);
    q.grad_normalized = static_cast<const T*>(p.grad_normalized);
    q.grad_x = static_cast<T*>(p.grad_x);
    q.accumulate = p.accumulate;
    W* partials = static_cast<W*>(p.partials);
    if (sums_norm) q.norm_partials = partials;
    if (p.grad_position) q.position_partials = partials + tiles * 2 * s.dim;
    const int terms = 4 * kTileTokens * static_cast<int>(sizeof(W));
    const int shared = terms + (partials ? 2 * kColumnSumBytes<W, unit, 3, kWarps> : 0);
    launch(token_features_backward_norm_kernel<T, unit>,
           Launch{"token_features_backward_norm_kernel", tiles, 32 * kWarps, shared, p.stream}, q);
    if (sums_norm) {
      const StoreNorm to{p.grad_norm_weight, p.grad_norm_bias, s.dtype, s.dim};
      sum_partials<W>(q.norm_partials, tiles, 2 * s.dim, to, p.stream);
    }
    if (p.grad_position) {
      const StoreAs to = store_wide<W>(p.grad_position);
      sum_partials<W>(q.position_partials, s.batch * q.cut.tiles, s.frames * s.dim, to, p.stream);
    }
  });
}

#endif  // __CUDACC_RTC__

}  // namespace inti::cuda
