// token_features: LayerNorm → Linear → GELU of every token, written as concatenated pairs; and back. The kernels of the
// backward are token_features_backward.h's.
#include "inti/cuda/token_features.h"

#include "gelu.h"
#include "gemm.h"
#include "moments.h"
#include "partial_sums.h"
#include "token_features_activation.h"
#include "token_features_backward.h"
#include "token_rows.h"

namespace inti::cuda {

// --- Forward ---------------------------------------------------------------------------------------------------------

template <class T, int V>
struct TokenFeaturesGemm {
  using Element = T;
  using W = Wide<T>;
  static constexpr int kVector = V, kSources = 1;
  static constexpr bool kReduces = false;

  TokenRows<T> in;
  const T* norm_weight;  // [dim]
  const T* norm_bias;    // [dim]
  W eps;
  W* statistics;     // [rows, 2]
  const T* weight;   // [columns, dim]
  const T* bias;     // [columns]
  T* features;       // [rows / 2 in pairs of frames, 2 · columns]
  T* preactivation;  // [rows, columns], or null
  int rows, columns, pitch;
  unsigned column_tiles;  // neighbouring blocks, of the same rows
  bool vectors;           // whether features and preactivation can be written 16 bytes at a time

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
      }
      measure(p, row);
    }
    // Mean and 1/√(variance + eps) of the rows, of which this thread and its three neighbours bring in a quarter each.
    // Every block measures its own rows, which it then finds in a cache: a pass of its own would read x twice.
    __device__ __forceinline__ void measure(const TokenFeaturesGemm& p, const int (&row)[COUNT]) {
      constexpr int kStep = 4 * N, kLoads = V > 1 ? 8 : 2;  // of each row, under way
      // Of what remains beside the mean of the row's beginning: one taken step by step would round at its full size.
      Moments<W> moments[COUNT];
      W shift[COUNT];
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const auto run = widen(load_packed<V>(x[i], p.in.dim - channel).unpacked());
        Vec<W, N> moved{};
        if (p.in.position) moved = load_some<kWideStep<W, V>, N>(p.in.position + position[i], p.in.dim - channel);
        W sum = 0;
#pragma unroll
        for (int k = 0; k < N; ++k) sum += run[k] + moved[k];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        shift[i] = sum / (p.in.dim < kStep ? p.in.dim : kStep);
      }
#pragma unroll 1
      for (int first = 0, left = p.in.dim - channel; left > 0; first += kStep * kLoads, left -= kStep * kLoads) {
        Packed<T> early[kLoads][COUNT];
#pragma unroll
        for (int n = 0; n < kLoads; ++n)
#pragma unroll
          for (int i = 0; i < COUNT; ++i) early[n][i] = load_packed<V>(x[i] + (first + n * kStep), left - n * kStep);
#pragma unroll
        for (int n = 0; n < kLoads; ++n) {
          const int there = left - n * kStep;
          if (there <= 0) break;
#pragma unroll
          for (int i = 0; i < COUNT; ++i) {
            auto run = widen(early[n][i].unpacked());
            if (p.in.position) {
              const auto moved =
                  load_some<kWideStep<W, V>, N>(p.in.position + (position[i] + first + n * kStep), there);
#pragma unroll
              for (int k = 0; k < N; ++k) run[k] += moved[k];
            }
#pragma unroll
            for (int k = 0; k < N; ++k) run[k] -= shift[i];
            if (V > 1 || there >= N) {
              moments[i].add(run);
            } else {
#pragma unroll
              for (int k = 0; k < N; ++k)
                if (k < there) moments[i].merge(1, run[k], 0);
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        moments[i].template over_lanes<4>();
        mean[i] = shift[i] + moments[i].mean;
        scale[i] = inverse_root(moments[i].variance() + p.eps);
        if (channel == 0 && blockIdx.x % p.column_tiles == 0)
          store(p.statistics + 2 * static_cast<int64_t>(row[i]), Vec<W, 2>{{mean[i], scale[i]}});
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

// 256 threads, 3 blocks an SM (80 registers); 2 in float64 and where elements come one by one.
template <class T, int V>
__global__ void __launch_bounds__(FmaTile<T>::kThreads, V > 1 && sizeof(T) < 8 ? 3 : FmaTile<T>::kBlocks)
    token_features_fma_kernel(const TokenFeaturesGemm<T, V> p) {
  fma_gemm(p);
}

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
  TokenFeaturesGemm<T, V> gemm{};
  gemm.in = in;
  gemm.norm_weight = static_cast<const T*>(p.norm_weight);
  gemm.norm_bias = static_cast<const T*>(p.norm_bias);
  gemm.eps = static_cast<Wide<T>>(p.eps);
  gemm.statistics = static_cast<Wide<T>*>(p.statistics);
  gemm.weight = static_cast<const T*>(p.weight);
  gemm.bias = static_cast<const T*>(p.bias);
  gemm.features = static_cast<T*>(p.features);
  gemm.preactivation = static_cast<T*>(p.preactivation);
  gemm.rows = rows;
  gemm.columns = counted(s.width, "width");
  counted(s.width * s.dim, "width · dim");
  gemm.pitch = in.dim;
  gemm.vectors = s.width % (16 / sizeof(T)) == 0 && all_aligned(p.features, p.preactivation);
  if constexpr (sizeof(T) == 2) {
    if (uses_tensor_cores<T>()) {
      gemm.column_tiles = divide_up(s.width, WmmaTile::kColumns);
      return launch_gemm<WmmaTile>(token_features_wmma_kernel<T, V>, "token_features_wmma_kernel", gemm, p.stream);
    }
  }
  if constexpr (!is_float16<T>) {
    gemm.column_tiles = divide_up(s.width, FmaTile<T>::kColumns);
    launch_gemm<FmaTile<T>>(token_features_fma_kernel<T, V>, "token_features_fma_kernel", gemm, p.stream);
  }
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
    return s.width % unit == 0 && p.grad_features_pitch % unit == 0 &&
           all_aligned(p.grad_features, p.preactivation, p.grad_preactivation, p.partials);
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
    q.grad_pitch = p.grad_features_pitch;
    q.preactivation = static_cast<const T*>(p.preactivation);
    q.grad_preactivation = static_cast<T*>(p.grad_preactivation);
    q.partials = static_cast<W*>(p.partials);
    const int shared = q.partials ? kColumnSumBytes<W, unit, 1, kWarps> : 0;
    launch(token_features_backward_activation_kernel<T, unit>,
           Launch{"token_features_backward_activation_kernel", tiles * q.column_tiles, 32 * kWarps, shared, p.stream,
                  32 * kWarps},
           q);
  });
  SumList sums(s.dtype, p.stream);
  sums.add(p.grad_bias, s.dtype, p.partials, tiles, s.width);
  sums.launch();
}

void token_features_activation(const TokenFeaturesActivation& p) {
  const auto& s = p.shape;
  const auto full_width = [&](int unit) { return s.width % unit == 0 && all_aligned(p.preactivation, p.features); };
  with_vectors(s.dtype, full_width, [&](auto number, auto unit) {
    using T = decltype(number);
    const unsigned column_tiles = divide_up(s.width, 32 * unit);
    const TokenTiles cut = token_tiles(s.batch * s.frames, s.tokens);
    const Activation<T> q{counted(s.tokens, "tokens"),
                          counted(s.width, "width"),
                          cut,
                          column_tiles,
                          static_cast<const T*>(p.preactivation),
                          static_cast<T*>(p.features)};
    const int64_t blocks = token_features_tiles(s) * column_tiles;
    launch(token_features_activation_kernel<T, unit>,
           Launch{"token_features_activation_kernel", blocks, 32 * kWarps, 0, p.stream, 32 * kWarps}, q);
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
           Launch{"token_features_normalize_kernel", blocks, 32 * kWarps, 0, p.stream, 32 * kWarps}, q);
  });
}

void token_features_backward_norm(const TokenFeaturesBackwardNorm& p) {
  const auto& s = p.shape;
  if (s.dim == 0) return;  // everything that it writes has a channel to each element
  if (p.total && wide_dtype(s.dtype) == s.dtype)
    throw std::invalid_argument("inti_kernels: token_features_backward_norm takes a total for 16-bit dtypes");
  const int64_t tiles = token_features_tiles(s);
  const auto full_width = [&](int unit) {
    return s.dim % unit == 0 && divides(unit, p.x_strides) &&
           all_aligned(p.x, p.position, p.norm_weight, p.grad_normalized, p.grad_x, p.total, p.norm_partials,
                       p.position_partials);
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
    q.accumulate = p.accumulate && p.grad_x;
    q.total = static_cast<W*>(p.total);
    q.norm_partials = static_cast<W*>(p.norm_partials);
    q.position_partials = static_cast<W*>(p.position_partials);
    constexpr int most = (kNormSharedBytes - kNormTermBytes<T>) / kNormColumnBytes<T> / unit * unit;
    q.column_tiles = divide_up(s.dim, most);
    q.slab = divide_up(divide_up(s.dim, q.column_tiles), unit) * unit;
    const int shared = kNormTermBytes<T> + kNormColumnBytes<T> * q.slab;
    const auto start = [&](auto kernel) {
      launch(kernel,
             Launch{"token_features_backward_norm_kernel", tiles * q.column_tiles, 32 * kNormWarps, shared, p.stream,
                    32 * kNormWarps},
             q);
    };
    if constexpr (sizeof(T) == 2) {
      if (p.total) return start(token_features_backward_norm_kernel<T, unit, true>);
    }
    start(token_features_backward_norm_kernel<T, unit, false>);
  });
  SumList sums(s.dtype, p.stream);
  if (p.norm_partials) {
    const int64_t dim = s.dim;
    const void* of_bias = SumList::element(p.norm_partials, wide_dtype(s.dtype), dim);
    sums.add({p.norm_partials, tiles, 2 * dim, dim, dim, dim, p.grad_norm_weight, s.dtype, false, false});
    sums.add({of_bias, tiles, 2 * dim, dim, dim, dim, p.grad_norm_bias, s.dtype, false, false});
  }
  const int64_t tiles_of_frame = s.batch * token_tiles(s.batch * s.frames, s.tokens).tiles;
  sums.add_wide(p.grad_position, p.position_partials, tiles_of_frame, s.frames * s.dim);
  sums.launch();
}

#endif  // __CUDACC_RTC__

}  // namespace inti::cuda
