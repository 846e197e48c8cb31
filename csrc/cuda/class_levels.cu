// The frame and the global level of the class tokens, and back. The frame level's rows are class_levels_rows.h's; here
// is the global level, a thread a channel of a clip, whose frames wait in a workspace.
#include "inti/cuda/class_levels.h"

#include "class_levels_rows.h"
#include "token_rows.h"
#include "vectors.h"

namespace inti::cuda {

constexpr int kConvolutions = kGlobalParameters / 2;
constexpr int kClipThreads = 128;  // of a block forward

// A channel of a clip's frames.
template <class W>
struct FramesOfChannel {
  W* at;
  int pitch;  // from frame to frame
  __device__ __forceinline__ W operator[](int t) const { return load(at + int64_t{t} * pitch); }
  __device__ __forceinline__ void set(int t, W value) const { store(at + int64_t{t} * pitch, value); }
};

template <class W>
struct TimeConvolution {
  W taps[3], bias;

  template <class T>
  __device__ __forceinline__ void read(const T* weight, const T* of_bias, int channel) {
#pragma unroll
    for (int tap = 0; tap < 3; ++tap) taps[tap] = widen(load(weight + 3 * int64_t{channel} + tap));
    bias = widen(load(of_bias + channel));
  }

  // A tap is left out where there is no frame, not multiplied by 0: it may be NaN.
  __device__ __forceinline__ void forward(const FramesOfChannel<W>& x, int frames, const FramesOfChannel<W>& y) const {
    W before = 0, here = x[0];
    for (int t = 0; t < frames; ++t) {
      const W after = t + 1 < frames ? x[t + 1] : W{0};
      W value = bias + here * taps[1];
      if (t > 0) value += before * taps[0];
      if (t + 1 < frames) value += after * taps[2];
      y.set(t, value);
      before = here;
      here = after;
    }
  }

  // The gradient of x; those of the parameters are added to `of`.
  __device__ __forceinline__ void backward(const FramesOfChannel<W>& grad, const FramesOfChannel<W>& x, int frames,
                                           const FramesOfChannel<W>& grad_x, Vec<W, 1>* of) const {
    W before = 0, here = grad[0];
    for (int t = 0; t < frames; ++t) {
      const W after = t + 1 < frames ? grad[t + 1] : W{0};
      W value = here * taps[1];
      of[1][0] += x[t] * here;
      of[3][0] += here;
      if (t > 0) {
        value += before * taps[2];
        of[0][0] += x[t - 1] * here;
      }
      if (t + 1 < frames) {
        value += after * taps[0];
        of[2][0] += x[t + 1] * here;
      }
      grad_x.set(t, value);
      before = here;
      here = after;
    }
  }
};

// Whether the second of two neighbours is what max pooling takes: where it is larger, or NaN.
template <class W>
__device__ __forceinline__ bool second_is_larger(W first, W second) {
  return second > first || second != second;
}

// What pooling takes of frames 2·i and, where there is one, 2·i + 1.
template <class W>
__device__ __forceinline__ W pool(const FramesOfChannel<W>& y, int frames, int i) {
  const W first = y[2 * i];
  if (2 * i + 1 == frames) return first;
  const W second = y[2 * i + 1];
  return second_is_larger(first, second) ? second : first;
}

template <class T>
struct Levels {
  using W = Wide<T>;
  ClassTokens<W> in;
  int64_t batch;
  const T* pair_preactivation;               // [batch, frames/2, dim], or null
  const T* convolutions[kGlobalParameters];  // or nulls
  W* workspace;                              // [batch, vectors, dim]
  int64_t vectors;
  W* context;                  // [batch, frames/2, dim], forward
  const W* grad_context;       // the same, backward
  T* grad_pair_preactivation;  // [batch, frames/2, dim]
  T* grad_pair_bias;           // [dim]
  T* grad_convolutions[kGlobalParameters];
};

// A channel of a clip in the global level: its frames before and behind each convolution, and two gradients of them.
template <class T>
struct ClipChannel {
  using W = Wide<T>;
  int frames[kConvolutions];
  FramesOfChannel<W> x[kConvolutions], y[kConvolutions], grad_x, grad_y;

  __device__ __forceinline__ ClipChannel(const Levels<T>& p, int64_t clip, int channel) {
    const int pitch = p.in.columns;
    W* next = p.workspace + clip * p.vectors * pitch + channel;
    const auto take = [&](int count) {
      const FramesOfChannel<W> taken{next, pitch};
      next += int64_t{count} * pitch;
      return taken;
    };
#pragma unroll
    for (int i = 0; i < kConvolutions; ++i) {
      frames[i] = i ? (frames[i - 1] + 1) / 2 : p.in.frames;
      x[i] = take(frames[i]);
      y[i] = take(frames[i]);
    }
    grad_x = take(frames[0]);
    grad_y = take(frames[0]);
    for (int t = 0; t < frames[0]; ++t) x[0].set(t, p.in.row(clip * p.in.frames + t)(channel));
  }

  // The mean of the last convolution's frames.
  __device__ __forceinline__ W mean(const TimeConvolution<W> (&convolutions)[kConvolutions]) const {
#pragma unroll
    for (int i = 0; i < kConvolutions; ++i) {
      convolutions[i].forward(x[i], frames[i], y[i]);
      if (i + 1 == kConvolutions) break;
      for (int t = 0; t < frames[i + 1]; ++t) x[i + 1].set(t, gelu(pool(y[i], frames[i], t)));
    }
    W sum = 0;
    for (int t = 0; t < frames[kConvolutions - 1]; ++t) sum += y[kConvolutions - 1][t];
    return sum / frames[kConvolutions - 1];
  }

  // From the mean's gradient to that of x[0], in grad_x.
  __device__ __forceinline__ void backward(W of_mean, const TimeConvolution<W> (&convolutions)[kConvolutions],
                                           Vec<W, 1>* of) const {
    for (int t = 0; t < frames[kConvolutions - 1]; ++t) grad_y.set(t, of_mean / frames[kConvolutions - 1]);
#pragma unroll
    for (int i = kConvolutions - 1; i >= 0; --i) {
      convolutions[i].backward(grad_y, x[i], frames[i], grad_x, of + 4 * i);
      if (i == 0) return;
      for (int t = 0; t < frames[i]; ++t) {
        const W grad = grad_x[t] * Gelu<W>(pool(y[i - 1], frames[i - 1], t)).slope;
        if (2 * t + 1 == frames[i - 1]) {
          grad_y.set(2 * t, grad);
        } else {
          const bool is_second = second_is_larger(y[i - 1][2 * t], y[i - 1][2 * t + 1]);
          grad_y.set(2 * t, is_second ? W{0} : grad);
          grad_y.set(2 * t + 1, is_second ? grad : W{0});
        }
      }
    }
  }
};

template <class T>
__device__ __forceinline__ void read_convolutions(const Levels<T>& p, int channel,
                                                  TimeConvolution<Wide<T>> (&convolutions)[kConvolutions]) {
#pragma unroll
  for (int k = 0; k < kConvolutions; ++k)
    convolutions[k].read(p.convolutions[2 * k], p.convolutions[2 * k + 1], channel);
}

// A thread a channel of a clip.
template <class T>
__global__ void __launch_bounds__(kClipThreads, sizeof(T) == 8 ? 4 : 8) class_levels_context_kernel(const Levels<T> p) {
  using W = Wide<T>;
  const int64_t index = int64_t{blockIdx.x} * kClipThreads + threadIdx.x, clip = index / p.in.columns;
  if (clip >= p.batch) return;
  const int channel = static_cast<int>(index - clip * p.in.columns);
  W level = 0;
  if (p.convolutions[0]) {
    TimeConvolution<W> convolutions[kConvolutions];
    read_convolutions(p, channel, convolutions);
    level = gelu(ClipChannel<T>(p, clip, channel).mean(convolutions));
  }
  for (int pair = 0; pair < p.in.frames / 2; ++pair) {
    const int64_t at = (clip * (p.in.frames / 2) + pair) * p.in.columns + channel;
    store(p.context + at, p.pair_preactivation ? gelu(widen(load(p.pair_preactivation + at))) + level : level);
  }
}

// A block has 32 channels; its warps share the clips, over which the parameters' gradients are sums.
template <class T>
__global__ void __launch_bounds__(32 * kSumWarps, 1) class_levels_backward_context_kernel(const Levels<T> p) {
  using W = Wide<T>;
  constexpr int kBias = 4 * kConvolutions;  // behind three taps and the bias of each convolution: the pairs' bias
  constexpr int kSums = kBias + 1;
  const int first = blockIdx.x * 32, channel = first + threadIdx.x % 32, pairs = p.in.frames / 2;
  Vec<W, 1> sums[kSums]{};
  if (channel < p.in.columns) {
    TimeConvolution<W> convolutions[kConvolutions];
    if (p.convolutions[0]) read_convolutions(p, channel, convolutions);
    for (int64_t clip = threadIdx.x / 32; clip < p.batch; clip += kSumWarps) {
      Vec<W, 1> of_clip[kSums]{};  // a chain of all clips' frames would round more than PyTorch's sums do
      W upstream = 0;
      for (int pair = 0; pair < pairs; ++pair) {
        const int64_t at = (clip * pairs + pair) * p.in.columns + channel;
        const W grad = load(p.grad_context + at);
        upstream += grad;
        if (!p.pair_preactivation) continue;
        const W of_pair = grad * Gelu<W>(widen(load(p.pair_preactivation + at))).slope;
        store(p.grad_pair_preactivation + at, narrow<T>(of_pair));
        of_clip[kBias][0] += of_pair;
      }
      if (p.convolutions[0]) {
        const ClipChannel<T> level(p, clip, channel);
        const W mean = level.mean(convolutions);
        level.backward(upstream * Gelu<W>(mean).slope, convolutions, of_clip);
        for (int t = 0; t < p.in.frames; ++t) p.in.row(clip * p.in.frames + t).store_gradient(channel, level.grad_x[t]);
      }
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i][0] += of_clip[i][0];
    }
  }
  sum_over_warps<kSumWarps>(dynamic_shared<W>(0), sums, [&](int which, int at, const Vec<W, 1>& total) {
    const int to = first + at;
    if (to >= p.in.columns) return;
    const T value = narrow<T>(total[0]);
    if (which == kBias) {
      if (p.grad_pair_bias) store(p.grad_pair_bias + to, value);
    } else if (p.grad_convolutions[0]) {
      T* const weight = p.grad_convolutions[which / 4 * 2];
      T* const bias = p.grad_convolutions[which / 4 * 2 + 1];
      if (which % 4 == 3)
        store(bias + to, value);
      else
        store(weight + 3 * int64_t{to} + which % 4, value);
    }
  });
}

// --- Host ------------------------------------------------------------------------------------------------------------
#ifndef __CUDACC_RTC__

int64_t clip_vectors(const ClassLevelsShape& s) { return 6 * s.frames + 8; }  // a pooling leaves half and one at most

// As much in either direction.
int64_t class_levels_workspace(const ClassLevelsShape& s) { return s.batch * clip_vectors(s) * s.dim; }

// Of any of the entry points' structs.
template <class W, class Params>
ClassTokens<W> class_tokens(const Params& p) {
  const auto& s = p.shape;
  counted(s.batch * s.frames, "batch · frames");
  if (s.frames % 2) throw std::invalid_argument("inti_kernels: class_levels takes an even number of frames");
  if (wide_dtype(s.x_dtype) != wide_dtype(s.dtype))
    throw std::invalid_argument("inti_kernels: class_levels takes float64 for all or for nothing");
  return {p.x,
          s.x_dtype,
          p.x_strides,
          static_cast<const W*>(p.position),
          counted(s.frames, "frames"),
          counted(s.dim, "dim"),
          nullptr,
          false};
}

template <class T>
Halves<T> halves(const ClassLevelsShape& s, const void* preactivation) {
  return {static_cast<const T*>(preactivation), counted(2 * s.half, "2 · half"), nullptr};
}

// What both directions of a LayerNorm have; calls f with it.
template <class Params, class F>
void with_norm(const Params& p, F f) {
  with_dtype(p.shape.dtype, [&](auto number) {
    using T = decltype(number);
    const auto tokens = class_tokens<Wide<T>>(p);
    const int64_t rows = p.shape.batch * p.shape.frames;
    const auto of = [&](auto in, int64_t count) {
      NormOfRows<T, decltype(in)> q{};
      q.in = in;
      q.rows = count;
      q.weight = static_cast<const T*>(p.norm_weight);
      q.bias = static_cast<const T*>(p.norm_bias);
      q.eps = static_cast<Wide<T>>(p.eps);
      q.normalized = static_cast<T*>(p.normalized);
      f(q, number);
    };
    if (p.preactivation)
      of(halves<T>(p.shape, p.preactivation), rows / 2);
    else
      of(tokens, rows);
  });
}

void class_levels_normalize(const ClassLevelsNormalize& p) {
  with_norm(p, [&](const auto& q, auto number) {
    using Source = std::decay_t<decltype(q.in)>;
    launch(class_levels_normalize_kernel<decltype(number), Source>,
           Launch{"class_levels_normalize_kernel", divide_up(q.rows, kRowWarps), 32 * kRowWarps, 0, p.stream,
                  32 * kRowWarps},
           q);
  });
}

void class_levels_backward_norm(const ClassLevelsBackwardNorm& p) {
  with_norm(p, [&](auto q, auto number) {
    using T = decltype(number);
    using Source = std::decay_t<decltype(q.in)>;
    q.grad_normalized = static_cast<const T*>(p.grad_normalized);
    q.statistics = static_cast<Wide<T>*>(p.statistics);
    if constexpr (std::is_same_v<Source, Halves<T>>) {
      q.in.grad = static_cast<T*>(p.grad_preactivation);
    } else {
      q.in.grad = static_cast<Wide<T>*>(p.grad_x);
      q.in.accumulate = p.accumulate;
    }
    launch(class_levels_backward_norm_kernel<T, Source>,
           Launch{"class_levels_backward_norm_kernel", divide_up(q.rows, kRowWarps), 32 * kRowWarps, 0, p.stream,
                  32 * kRowWarps},
           q);
  });
}

void class_levels_backward_sums(const ClassLevelsBackwardSums& p) {
  with_dtype(p.shape.dtype, [&](auto number) {
    using T = decltype(number);
    using W = Wide<T>;
    LevelSums<T> q{};
    const int64_t rows = p.shape.batch * p.shape.frames;
    q.frames.in = class_tokens<W>(p);
    q.frames.rows = rows;
    q.frames.grad_normalized = static_cast<const T*>(p.grad_normalized[0]);
    q.frames.statistics = static_cast<W*>(const_cast<void*>(p.statistics[0]));
    q.pairs.in = halves<T>(p.shape, p.preactivation);
    q.pairs.rows = rows / 2;
    q.pairs.grad_normalized = static_cast<const T*>(p.grad_normalized[1]);
    q.pairs.statistics = static_cast<W*>(const_cast<void*>(p.statistics[1]));
    q.of_frames = {static_cast<T*>(p.grad_norm_weight[0]), static_cast<T*>(p.grad_norm_bias[0])};
    q.of_pairs = {static_cast<T*>(p.grad_norm_weight[1]), static_cast<T*>(p.grad_norm_bias[1])};
    q.grad_preactivation = static_cast<const T*>(p.grad_preactivation);
    q.grad_bias = static_cast<T*>(p.grad_bias);
    q.half = static_cast<int>(p.shape.half);
    const int blocks = divide_up(q.frames.in.columns, 32) + divide_up(q.pairs.in.columns, 32) + divide_up(q.half, 32);
    const int shared = kColumnSumBytes<W, 1, 2, kSumWarps>;
    launch(class_levels_backward_sums_kernel<T>,
           Launch{"class_levels_backward_sums_kernel", blocks, 32 * kSumWarps, shared, p.stream, 32 * kSumWarps}, q);
  });
}

// What both directions of the context have.
template <class T, class Params>
Levels<T> levels(const Params& p) {
  Levels<T> q{};
  q.in = class_tokens<Wide<T>>(p);
  q.batch = p.shape.batch;
  q.pair_preactivation = static_cast<const T*>(p.pair_preactivation);
  for (int i = 0; i < kGlobalParameters; ++i) q.convolutions[i] = static_cast<const T*>(p.convolutions[i]);
  q.workspace = static_cast<Wide<T>*>(p.workspace);
  q.vectors = clip_vectors(p.shape);
  return q;
}

void class_levels_context(const ClassLevelsContext& p) {
  const auto& s = p.shape;
  if (s.frames == 0) return;
  with_dtype(s.dtype, [&](auto number) {
    using T = decltype(number);
    auto q = levels<T>(p);
    q.context = static_cast<Wide<T>*>(p.context);
    const int64_t blocks = (s.batch * s.dim + kClipThreads - 1) / kClipThreads;
    launch(class_levels_context_kernel<T>,
           Launch{"class_levels_context_kernel", blocks, kClipThreads, 0, p.stream, kClipThreads}, q);
  });
}

void class_levels_backward_context(const ClassLevelsBackwardContext& p) {
  with_dtype(p.shape.dtype, [&](auto number) {
    using T = decltype(number);
    using W = Wide<T>;
    auto q = levels<T>(p);
    if ((q.pair_preactivation && !(p.grad_pair_preactivation && p.grad_pair_bias)) ||
        (q.convolutions[0] && !(p.grad_x && p.grad_convolutions[0])))
      throw std::invalid_argument("inti_kernels: class_levels_backward_context gives a level all of its gradients");
    if (p.shape.frames == 0) q.batch = 0;
    q.in.grad = static_cast<W*>(p.grad_x);
    q.grad_context = static_cast<const W*>(p.grad_context);
    q.grad_pair_preactivation = static_cast<T*>(p.grad_pair_preactivation);
    q.grad_pair_bias = static_cast<T*>(p.grad_pair_bias);
    for (int i = 0; i < kGlobalParameters; ++i) q.grad_convolutions[i] = static_cast<T*>(p.grad_convolutions[i]);
    const int shared = kColumnSumBytes<W, 1, 4 * kConvolutions + 1, kSumWarps>;
    launch(class_levels_backward_context_kernel<T>,
           Launch{"class_levels_backward_context_kernel", divide_up(p.shape.dim, 32), 32 * kSumWarps, shared, p.stream,
                  32 * kSumWarps},
           q);
  });
}

#endif  // __CUDACC_RTC__

}  // namespace inti::cuda
