// interpolation_head: Linear over [features ; cube + frame_context] → GELU → difference of two logits → interpolation;
// and back, up to the products of the Linear.
#include "inti/cuda/interpolation_head.h"

#include "column_sums.h"
#include "gelu.h"
#include "gemm.h"
#include "interpolate.h"
#include "inti/cuda/pair_interpolate.h"
#include "partial_sums.h"
#include "token_rows.h"

namespace inti::cuda {

// --- Forward: the hidden layer ---------------------------------------------------------------------------------------

template <class T, int V>
struct InterpolationHeadGemm {
  using Element = T;
  using W = Wide<T>;
  static constexpr int kVector = V, kSources = 2;
  static constexpr bool kReduces = true;

  const T* features;    // [rows, width]
  const T* cube;        // [rows, context], or null with context 0
  const W* frame_bias;  // [rows / tokens, columns], or null
  const T* weight;      // [columns, pitch]: width of the features, context of the cube
  const T* bias;        // [columns]
  const T* weight2;     // [2, columns]; null with partials
  T* preactivation;     // [rows, columns], or null
  W* partials;          // [groups of 64 columns, rows], or null
  int rows, columns, pitch, width, context, tokens;
  bool vectors;  // whether preactivation and frame_bias can be accessed 16 bytes at a time

  __device__ __forceinline__ int extent(int source) const { return source ? context : width; }

  // [features ; cube], which never lie together.
  template <int COUNT>
  struct Rows {
    static constexpr int N = 16 / sizeof(T);
    struct Late {};
    int row[COUNT];
    const T* at[COUNT];
    Packed<T> runs[COUNT];

    __device__ __forceinline__ Rows(const InterpolationHeadGemm& p, const int (&rows)[COUNT], int offset) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        row[i] = rows[i];
        at[i] = p.features + static_cast<int64_t>(row[i]) * p.width + offset;
      }
    }
    __device__ __forceinline__ void next_source(const InterpolationHeadGemm& p, int offset) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) at[i] = p.cube + static_cast<int64_t>(row[i]) * p.context + offset;
    }
    __device__ __forceinline__ void fetch(const InterpolationHeadGemm&) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) runs[i] = load_packed<V>(at[i]);
    }
    __device__ __forceinline__ void fetch(const InterpolationHeadGemm&, int left) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) runs[i] = load_packed<V>(at[i], left);
    }
    __device__ __forceinline__ void advance(int elements) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) at[i] += elements;
    }
    __device__ __forceinline__ Late late(const InterpolationHeadGemm&, bool, int) const { return {}; }
    template <class S>
    __device__ __forceinline__ Vec<S, N> staged(const InterpolationHeadGemm&, const Late&, int i) const {
      return converted<S>(runs[i].unpacked());
    }
  };

  template <int N>
  struct Columns {
    int first, left;
    Vec<W, N> bias, difference;  // difference: of weight2's rows, 0 past the edge
    __device__ __forceinline__ Columns(const InterpolationHeadGemm& p, int column)
        : first(column), left(p.columns - column), bias(widen(load_some<1, N>(p.bias + column, left))), difference{} {
      if (!p.weight2) return;
      const auto a = widen(load_some<1, N>(p.weight2 + column, left));
      const auto b = widen(load_some<1, N>(p.weight2 + p.columns + column, left));
#pragma unroll
      for (int k = 0; k < N; ++k) difference[k] = a[k] - b[k];
    }
  };

  template <int N>
  __device__ __forceinline__ W finish(const Columns<N>& at, int row, Vec<W, N> sums) const {
#pragma unroll
    for (int k = 0; k < N; ++k) sums[k] += at.bias[k];
    if (frame_bias) {
      const W* from = frame_bias + static_cast<int64_t>(row / tokens) * columns + at.first;
      const auto added = vectors ? load_some<kWideStep<W, N>, N>(from, at.left) : load_some<1, N>(from, at.left);
#pragma unroll
      for (int k = 0; k < N; ++k) sums[k] += added[k];
    }
    if (preactivation)
      store_some(preactivation + static_cast<int64_t>(row) * columns + at.first, sums, at.left, vectors);
    W total = 0;
    if (!partials) return total;
#pragma unroll
    for (int k = 0; k < N; ++k)
      if (k < at.left) total += gelu(sums[k]) * at.difference[k];
    return total;
  }

  __device__ __forceinline__ void store_row(int group, int row, W total) const {
    if (partials) store(partials + static_cast<int64_t>(group) * rows + row, total);
  }
};

// 128 threads, 3 blocks an SM (168 registers, 90 KiB of its shared memory): three warps a scheduler, one of which
// multiplies while others stage. 2 blocks where elements come one by one.
template <class T, int V>
__global__ void __launch_bounds__(WmmaTile::kThreads, WmmaTile::kBlocks<V>)
    interpolation_head_wmma_kernel(const InterpolationHeadGemm<T, V> p) {
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
    interpolation_head_fma_kernel(const InterpolationHeadGemm<T, V> p) {
  fma_gemm(p);
}

// --- Forward and backward: the interpolation; the kernels are interpolate.h's ----------------------------------------

template <class W>
struct HeadWeights {
  W first, second, difference;
  // Both by their own quotient: 1 - α would lose a small β's digits. An infinite difference gives NaN: loss scaling has
  // to see that the network has overflowed. PyTorch's softmax gives NaN for a logit of +inf only, and weights of 0 and
  // 1 for one of -inf; a difference doesn't say which of the two logits it is from.
  __device__ __forceinline__ explicit HeadWeights(W logits)
      : first(1 / (1 + exponential(-logits)) + 0 * logits),
        second(1 / (1 + exponential(logits)) + 0 * logits),
        difference(logits) {}
};

// Weights from the partial differences that the product's blocks have left.
template <class W>
struct PartialDifferences {
  using Softmax = W;
  const W* partials;  // [count, pairs]
  int count;
  int64_t pairs;
  const void* bias2;  // [2], dtype
  W* difference;      // [pairs]
  void* stored;       // [pairs, 2], dtype: the weights
  DType dtype;

  __device__ __forceinline__ HeadWeights<W> weights(int64_t pair) const {
    W sum = read<W>(bias2, dtype, 0) - read<W>(bias2, dtype, 1);
#pragma unroll 4
    for (int i = 0; i < count; ++i) sum += load(partials + i * pairs + pair);
    return HeadWeights<W>(sum);
  }
  __device__ __forceinline__ void store_weights(int64_t pair, const HeadWeights<W>& both) const {
    write(stored, dtype, 2 * pair, both.first);
    write(stored, dtype, 2 * pair + 1, both.second);
    store(difference + pair, both.difference);
  }
};

template <class W>
struct Differences {
  using Softmax = W;
  const W* difference;       // [pairs]
  const void* grad_weights;  // [pairs, 2], dtype
  W* stored;                 // [pairs]: gradient of the difference
  DType dtype;

  __device__ __forceinline__ HeadWeights<W> weights(int64_t pair) const {
    return HeadWeights<W>(load(difference + pair));
  }
  __device__ __forceinline__ bool wants_gradient() const { return true; }
  __device__ __forceinline__ W grad_difference(int64_t pair) const {
    return read<W>(grad_weights, dtype, 2 * pair) - read<W>(grad_weights, dtype, 2 * pair + 1);
  }
  __device__ __forceinline__ void store_gradient(int64_t pair, W gradient) const { store(stored + pair, gradient); }
};

// --- Backward: the hidden layer --------------------------------------------------------------------------------------

constexpr int kHiddenWarps = 4;     // of a block; they share a tile's tokens
constexpr int kHiddenInFlight = 4;  // tokens of a warp that are loaded at once

template <class T>
struct HiddenBackward {
  int tokens, hidden;
  TokenTiles cut;
  unsigned column_tiles, frames;   // pairs of frames, of all clips
  const Wide<T>* grad_difference;  // [frames, tokens]
  const T* preactivation;          // [frames, tokens, hidden]
  const T* weight2;                // [2, hidden]
  T* grad_preactivation;           // [frames, tokens, hidden]
  Wide<T>* frame_partials;         // [tiles of a frame, frames, hidden]: sums of grad_preactivation, or null
  Wide<T>* weight2_partials;       // [frames, tiles of a frame, hidden]: of weight2's first row, or null
};

// grad_preactivation = grad_difference · (weight2[0] - weight2[1]) · GELU'(preactivation), and sums over a tile's
// tokens. 128 threads, 4 blocks an SM (128 registers): 16 warps · 32 · 64 bytes = 32 KiB in flight. Fewer in
// float64, whose erf and exp take more registers.
template <class T, int V>
__global__ void __launch_bounds__(32 * kHiddenWarps, sizeof(T) == 8 ? 2 : 4)
    interpolation_head_hidden_kernel(const HiddenBackward<T> p) {
  using W = Wide<T>;
  const TileOfTokens tile(p.cut, p.tokens, p.column_tiles);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_column = tile.columns * 32 * V, column = first_column + lane * V;
  const int64_t row = static_cast<int64_t>(tile.frame) * p.tokens + tile.first;
  const T* preactivation = p.preactivation + row * p.hidden + column;
  T* grad_preactivation = p.grad_preactivation + row * p.hidden + column;

  Vec<W, V> sums[2]{};  // of grad_preactivation; of grad_difference · GELU
  if (column < p.hidden) {
    const auto plus = widen(load<V>(p.weight2 + column)), minus = widen(load<V>(p.weight2 + p.hidden + column));
    for (int first = warp; first < tile.count; first += kHiddenWarps * kHiddenInFlight) {
      Vec<T, V> runs[kHiddenInFlight];  // [V] of each token
      W upstream[kHiddenInFlight];
#pragma unroll
      for (int i = 0; i < kHiddenInFlight; ++i) {
        const int64_t token = first + i * kHiddenWarps;
        if (token >= tile.count) break;
        runs[i] = load<V>(preactivation + token * p.hidden);
        upstream[i] = load(p.grad_difference + row + token);
      }
#pragma unroll
      for (int i = 0; i < kHiddenInFlight; ++i) {
        const int64_t token = first + i * kHiddenWarps;
        if (token >= tile.count) break;
        auto run = widen(runs[i]);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const Gelu<W> at(run[k]);
          run[k] = upstream[i] * (plus[k] - minus[k]) * at.slope;
          sums[0][k] += run[k];
          sums[1][k] += upstream[i] * at.value;
        }
        store(grad_preactivation + token * p.hidden, narrow<T>(run));
      }
    }
  }
  if (!p.frame_partials && !p.weight2_partials) return;
  const int64_t hidden = p.hidden, frames = p.frames, tile_in_frame = tile.tile % p.cut.tiles;
  sum_over_warps<kHiddenWarps>(dynamic_shared<W>(0), sums,
                               [&](int which, int at, const Vec<W, kExchanged<W, V>>& total) {
                                 const int to = first_column + at;
                                 if (to >= p.hidden) return;
                                 if (which == 1) {
                                   if (p.weight2_partials) store(p.weight2_partials + tile.tile * hidden + to, total);
                                 } else if (p.frame_partials) {
                                   store(p.frame_partials + (tile_in_frame * frames + tile.frame) * hidden + to, total);
                                 }
                               });
}

// --- Host ------------------------------------------------------------------------------------------------------------
#ifndef __CUDACC_RTC__

inline int64_t rows_of(const InterpolationHeadShape& shape) { return shape.batch * (shape.frames / 2) * shape.tokens; }

int64_t interpolation_head_partials(const InterpolationHeadShape& shape) {
  return (shape.hidden + kGroupColumns - 1) / kGroupColumns;
}

inline TokenTiles hidden_tiles(const InterpolationHeadShape& shape) {
  return token_tiles(shape.batch * (shape.frames / 2), shape.tokens, divide_up(shape.hidden, 256));
}

int64_t interpolation_head_tiles(const InterpolationHeadShape& shape) {
  return shape.batch * (shape.frames / 2) * hidden_tiles(shape).tiles;
}

// features, cube, frame_bias, weight1, bias1, preactivation; weight2 and partials, or neither.
template <class T, int V>
void launch_hidden_forward(const InterpolationHeadForward& p) {
  const auto& s = p.shape;
  InterpolationHeadGemm<T, V> q{};
  q.features = static_cast<const T*>(p.features);
  q.cube = static_cast<const T*>(p.cube);
  q.frame_bias = static_cast<const Wide<T>*>(p.frame_bias);
  q.weight = static_cast<const T*>(p.weight1);
  q.bias = static_cast<const T*>(p.bias1);
  q.weight2 = static_cast<const T*>(p.weight2);
  q.preactivation = static_cast<T*>(p.preactivation);
  q.partials = static_cast<Wide<T>*>(p.partials);
  q.rows = counted(rows_of(s), "batch · frames/2 · tokens");
  q.columns = counted(s.hidden, "hidden");
  q.pitch = counted(s.width + s.context, "width + context");
  counted(s.hidden * q.pitch, "hidden · (width + context)");
  q.width = static_cast<int>(s.width);
  q.context = p.cube ? static_cast<int>(s.context) : 0;
  q.tokens = counted(s.tokens, "tokens");
  q.vectors = s.hidden % (16 / sizeof(T)) == 0 && all_aligned(p.preactivation, p.frame_bias);
  if constexpr (sizeof(T) == 2) {
    if (uses_tensor_cores<T>()) {
      const auto kernel = interpolation_head_wmma_kernel<T, V>;
      return launch_gemm<WmmaTile>(kernel, "interpolation_head_wmma_kernel", q, p.stream);
    }
  }
  if constexpr (!is_float16<T>)
    launch_gemm<FmaTile<T>>(interpolation_head_fma_kernel<T, V>, "interpolation_head_fma_kernel", q, p.stream);
}

void hidden_forward(const InterpolationHeadForward& p) {
  const auto& s = p.shape;
  const auto full_width = [&](int unit) {
    return s.width % unit == 0 && s.context % unit == 0 && all_aligned(p.features, p.cube, p.weight1);
  };
  with_vectors(s.dtype, full_width, [&](auto number, auto unit) { launch_hidden_forward<decltype(number), unit>(p); });
}

void interpolation_head_preactivation(const InterpolationHeadPreactivation& p) {
  InterpolationHeadForward q{};
  q.shape = p.shape;
  q.features = p.features;
  q.cube = p.cube;
  q.frame_bias = p.frame_bias;
  q.weight1 = p.weight1;
  q.bias1 = p.bias1;
  q.preactivation = p.preactivation;
  q.stream = p.stream;
  hidden_forward(q);
}

void interpolation_head_forward(const InterpolationHeadForward& p) {
  const auto& s = p.shape;
  hidden_forward(p);
  with_dtype(s.x_dtype, [&](auto number) {
    using W = Wide<decltype(number)>;
    InterpolateForward q{};
    q.frames = s.frames;
    q.tokens = s.tokens;
    q.dim = s.dim;
    q.x = p.x;
    q.x_strides = p.x_strides;
    q.position = p.position;
    q.z = p.z;
    const PartialDifferences<W> source{static_cast<const W*>(p.partials),
                                       static_cast<int>(interpolation_head_partials(s)),
                                       rows_of(s),
                                       p.bias2,
                                       static_cast<W*>(p.difference),
                                       p.weights,
                                       s.dtype};
    interpolate_forward<decltype(number)>(q, s.batch, source, p.stream);
  });
}

// grad_x, position_partials and grad_difference.
template <class T>
void interpolation_backward(const InterpolationHeadBackward& p, SumList& sums) {
  using W = Wide<T>;
  const auto& s = p.shape;
  InterpolateBackward q{};
  q.frames = s.frames;
  q.tokens = s.tokens;
  q.dim = s.dim;
  q.x = p.x;
  q.x_strides = p.x_strides;
  q.position = p.position;
  q.grad_z = p.grad_z;
  q.grad_z_strides = p.grad_z_strides;
  q.grad_x = p.grad_x;
  q.accumulate = p.accumulate;
  q.partials = p.position_partials;
  const Differences<W> source{static_cast<const W*>(p.difference), p.grad_weights, static_cast<W*>(p.grad_difference),
                              s.dtype};
  interpolate_backward<T>(q, s.batch, p.grad_position, source, sums, p.stream);
}

// grad_preactivation, frame_partials and weight2_partials.
template <class T, int V>
void hidden_backward(const InterpolationHeadBackward& p) {
  using W = Wide<T>;
  const auto& s = p.shape;
  HiddenBackward<T> q{};
  counted(rows_of(s), "batch · frames/2 · tokens");
  q.tokens = counted(s.tokens, "tokens");
  q.hidden = counted(s.hidden, "hidden");
  q.cut = hidden_tiles(s);
  q.column_tiles = divide_up(s.hidden, 32 * V);
  q.frames = static_cast<unsigned>(s.batch * (s.frames / 2));
  q.grad_difference = static_cast<const W*>(p.grad_difference);
  q.preactivation = static_cast<const T*>(p.preactivation);
  q.weight2 = static_cast<const T*>(p.weight2);
  q.grad_preactivation = static_cast<T*>(p.grad_preactivation);
  q.frame_partials = static_cast<W*>(p.frame_partials);
  q.weight2_partials = static_cast<W*>(p.weight2_partials);
  const int shared = p.frame_partials || p.weight2_partials ? kColumnSumBytes<W, V, 2, kHiddenWarps> : 0;
  const int64_t blocks = interpolation_head_tiles(s) * q.column_tiles;
  launch(interpolation_head_hidden_kernel<T, V>,
         Launch{"interpolation_head_hidden_kernel", blocks, 32 * kHiddenWarps, shared, p.stream, 32 * kHiddenWarps}, q);
}

void interpolation_head_backward(const InterpolationHeadBackward& p) {
  const auto& s = p.shape;
  SumList sums(s.dtype, p.stream);
  with_dtype(s.x_dtype, [&](auto number) { interpolation_backward<decltype(number)>(p, sums); });
  if (p.grad_preactivation) {
    const auto full_width = [&](int unit) {
      return s.hidden % unit == 0 &&
             all_aligned(p.preactivation, p.weight2, p.grad_preactivation, p.frame_partials, p.weight2_partials);
    };
    with_vectors(s.dtype, full_width, [&](auto number, auto unit) { hidden_backward<decltype(number), unit>(p); });
    const int64_t frames = s.batch * (s.frames / 2), tiles = hidden_tiles(s).tiles;
    sums.add_wide(p.grad_frame_bias, p.frame_partials, tiles, frames * s.hidden);
    sums.add(p.grad_bias1, s.dtype, p.frame_partials, tiles * frames, s.hidden);
    sums.add_both_signs(p.grad_weight2, s.dtype, p.weight2_partials, tiles * frames, s.hidden);
  }
  sums.add_both_signs(p.grad_bias2, s.dtype, p.grad_difference, rows_of(s), 1);
  sums.launch();
}

#endif  // __CUDACC_RTC__

}  // namespace inti::cuda
