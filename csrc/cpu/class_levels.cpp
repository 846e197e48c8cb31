// The frame level as two layers of a few rows, and the global level a vector of channels at a time: all frames of a
// clip stay in the first cache, and the backward computes them again.
#include "inti/class_levels.h"

#include "gelu.h"
#include "inti/few_rows.h"
#include "rows.h"

namespace inti::INTI_ISA {

// Of another file of the same instruction set; kernels.inc, which declares all, is of all sets.
void few_rows_forward(const FewRowsForward&);
void few_rows_backward(const FewRowsBackward&);

namespace {

constexpr int64_t kChannels = 64;  // of a task

// Vectors of a clip's frames, in memory that needn't be aligned.
template <class A>
struct Frames {
  A* at;
  __attribute__((always_inline)) Vec<A> operator[](int64_t t) const { return load(at + t * kLanes<A>); }
  __attribute__((always_inline)) void set(int64_t t, const Vec<A>& v) const { store(at + t * kLanes<A>, v); }
  __attribute__((always_inline)) Frames behind(int64_t frames) const { return {at + frames * kLanes<A>}; }
};

template <class A>
struct Convolution {
  Vec<A> taps[3], bias;

  // Channels [c, c + count) of weight [dim, 3] and bias [dim].
  __attribute__((always_inline)) Convolution(const A* weight, const A* of_bias, int64_t c, int count)
      : bias(load_first(of_bias + c, count)) {
    for (int tap = 0; tap < 3; ++tap) {
      A lanes[kLanes<A>] = {};
      for (int i = 0; i < count; ++i) lanes[i] = weight[(c + i) * 3 + tap];
      taps[tap] = load(lanes);
    }
  }

  __attribute__((always_inline)) void forward(Frames<A> x, int64_t frames, Frames<A> y) const {
    for (int64_t t = 0; t < frames; ++t) {
      Vec<A> v = bias + x[t] * taps[1];
      if (t > 0) v += x[t - 1] * taps[0];
      if (t + 1 < frames) v += x[t + 1] * taps[2];
      y.set(t, v);
    }
  }

  // The gradients of x, to grad_x, and of the parameters, added to `of`.
  __attribute__((always_inline)) void backward(Frames<A> grad, Frames<A> x, int64_t frames, Frames<A> grad_x,
                                               Vec<A> (&of)[4]) const {
    for (int64_t t = 0; t < frames; ++t) {
      const Vec<A> g = grad[t];
      Vec<A> v = g * taps[1];
      of[1] += x[t] * g;
      of[3] += g;
      if (t > 0) {
        v += grad[t - 1] * taps[2];
        of[0] += x[t - 1] * g;
      }
      if (t + 1 < frames) {
        v += grad[t + 1] * taps[0];
        of[2] += x[t + 1] * g;
      }
      grad_x.set(t, v);
    }
  }
};

INTI_INLINE int64_t pooled(int64_t frames) { return (frames + 1) / 2; }

// Whether the second of two neighbours is what max pooling takes: where it is larger, or NaN.
template <class A>
INTI_INLINE auto second_is_larger(const Vec<A>& first, const Vec<A>& second) {
  return (second > first) | (second != second);
}

// What pooling takes of frames 2·i and, where there is one, 2·i + 1.
template <class A>
INTI_INLINE Vec<A> pool(Frames<A> y, int64_t frames, int64_t i) {
  const Vec<A> first = y[2 * i];
  if (2 * i + 1 == frames) return first;
  const Vec<A> second = y[2 * i + 1];
  return second_is_larger<A>(first, second) ? second : first;
}

// A clip's channels before and behind each convolution; the last one's result is only needed in the mean.
template <class A>
struct Clip {
  int64_t frames[kGlobalConvolutions];
  Frames<A> x[kGlobalConvolutions], y[kGlobalConvolutions], grad_x, grad_y;

  __attribute__((always_inline)) Clip(void* workspace, int64_t of_clip) {
    Frames<A> next{static_cast<A*>(workspace) + thread_number() * global_level_vectors(of_clip) * kLanes<A>};
    const auto take = [&](int64_t count) {
      const Frames<A> taken = next;
      next = next.behind(count);
      return taken;
    };
    for (int i = 0; i < kGlobalConvolutions; ++i) {
      frames[i] = i ? pooled(frames[i - 1]) : of_clip;
      x[i] = take(frames[i]);
      y[i] = take(frames[i]);
    }
    grad_x = take(of_clip);
    grad_y = take(of_clip);
  }

  // The mean of the last convolution's frames; x[0] is there.
  __attribute__((always_inline)) Vec<A> mean(const Convolution<A>* convolutions) const {
    for (int i = 0; i < kGlobalConvolutions; ++i) {
      convolutions[i].forward(x[i], frames[i], y[i]);
      if (i + 1 == kGlobalConvolutions) break;
      for (int64_t t = 0; t < frames[i + 1]; ++t) x[i + 1].set(t, gelu<A>(pool(y[i], frames[i], t)).value);
    }
    Vec<A> sum = {};
    for (int64_t t = 0; t < frames[kGlobalConvolutions - 1]; ++t) sum += y[kGlobalConvolutions - 1][t];
    return sum / A(frames[kGlobalConvolutions - 1]);
  }

  // From the mean's gradient to that of x[0], in grad_x.
  __attribute__((always_inline)) void backward(const Vec<A>& of_mean, const Convolution<A>* convolutions,
                                               Vec<A> (&of)[kGlobalConvolutions][4]) const {
    const int last = kGlobalConvolutions - 1;
    for (int64_t t = 0; t < frames[last]; ++t) grad_y.set(t, of_mean / A(frames[last]));
    for (int i = last;; --i) {
      convolutions[i].backward(grad_y, x[i], frames[i], grad_x, of[i]);
      if (i == 0) return;
      for (int64_t t = 0; t < frames[i]; ++t) {
        const Vec<A> grad = grad_x[t] * gelu<A>(pool(y[i - 1], frames[i - 1], t)).slope;
        if (2 * t + 1 == frames[i - 1]) {
          grad_y.set(2 * t, grad);
        } else {
          const auto is_second = second_is_larger<A>(y[i - 1][2 * t], y[i - 1][2 * t + 1]);
          grad_y.set(2 * t, is_second ? Vec<A>{} : grad);
          grad_y.set(2 * t + 1, is_second ? grad : Vec<A>{});
        }
      }
    }
  }
};

// Calls block(c, count, convolutions, load, store) for every vector of channels.
template <class A, class Block>
void for_each_channels(const ClassLevels& p, const Block& block) {
  const int64_t dim = p.shape.dim;
  parallel_for(parts_of(dim, kChannels), p.shape.threads, [&](int64_t i) {
    const int64_t begin = i * kChannels, size = least(kChannels, dim - begin);
    for_each_vector<A>(size, [&](int64_t at, auto load, auto store) __attribute__((always_inline)) {
      const int64_t c = begin + at;
      const int count = int(least(kLanes<A>, dim - c));
      const auto convolution = [&](int k) __attribute__((always_inline)) {
        return Convolution<A>(static_cast<const A*>(p.convolutions[2 * k]),
                              static_cast<const A*>(p.convolutions[2 * k + 1]), c, count);
      };
      const Convolution<A> convolutions[kGlobalConvolutions] = {convolution(0), convolution(1), convolution(2)};
      block(c, count, convolutions, load, store);
    });
  });
}

// What both directions work on.
template <class A>
struct Levels {
  const ClassLevels& p;
  int64_t rows;  // frames of all clips
  A *x, *statistics, *normalized, *halves, *grad_preactivation, *grad_normalized, *grad_halves, *clips;

  explicit Levels(const ClassLevels& levels) : p(levels), rows(p.shape.batch * p.shape.frames) {
    const ClassLevelsWorkspace at(p.shape.batch, p.shape.frames, p.shape.dim, p.shape.half, p.shape.threads);
    A* const workspace = static_cast<A*>(p.workspace);
    x = workspace + at.x;
    statistics = workspace + at.statistics;
    normalized = workspace + at.normalized;
    halves = workspace + at.halves;
    grad_preactivation = workspace + at.grad_preactivation;
    grad_normalized = workspace + at.grad_normalized;
    grad_halves = workspace + at.grad_halves;
    clips = workspace + at.clips;
  }

  bool has_frame() const { return p.frame[0]; }
  bool has_global() const { return p.convolutions[0]; }

  FewRowsShape of_frames() const { return {rows, p.shape.dim, p.shape.half, p.shape.dtype, p.shape.threads}; }
  FewRowsShape of_pairs() const { return {rows / 2, 2 * p.shape.half, p.shape.dim, p.shape.dtype, p.shape.threads}; }

  // x + σ·P.
  void gather() const {
    const int64_t dim = p.shape.dim;
    by_dtype(p.shape.x_dtype, [&](auto type) {
      using T = element_t<decltype(type)>;
      if constexpr (sizeof(wide_t<T>) == sizeof(A))
        parallel_for(rows, p.shape.threads, [&](int64_t row) {
          const int64_t frame = row % p.shape.frames;
          const T* from = token<T>(p.x, p.x_strides, row / p.shape.frames, frame, 0);
          const A* position = p.position ? static_cast<const A*>(p.position) + frame * dim : nullptr;
          for_each_vector<T>(dim, [&](int64_t c, auto load, auto store) __attribute__((always_inline)) {
            store(x + row * dim + c, position ? load(from + c) + load(position + c) : load(from + c));
          });
        });
    });
  }

  // A layer, forward or backward, without what only one direction has: `first` of its parameters.
  template <class Layer>
  Layer layer(const FewRowsShape& shape, int first, const A* input) const {
    Layer layer{};
    layer.shape = shape;
    layer.x = input;
    layer.norm_weight = p.frame[first];
    layer.norm_bias = p.frame[first + 1];
    layer.eps = p.eps[first / 4];
    layer.statistics = statistics;
    layer.normalized = normalized;
    layer.weight = p.frame[first + 2];
    layer.weight_pitch = shape.in;
    return layer;
  }

  void layer_forward(const FewRowsShape& shape, int first, const A* input, void* preactivation, A* y) const {
    auto layer = this->layer<FewRowsForward>(shape, first, input);
    layer.bias = p.frame[first + 3];
    layer.preactivation = preactivation;
    layer.y = y;
    few_rows_forward(layer);
  }

  void layer_backward(const FewRowsShape& shape, int first, const A* input, const void* preactivation,
                      const void* grad_y, void* grad_x, void* const* grads) const {
    auto layer = this->layer<FewRowsBackward>(shape, first, input);
    layer.grad_y = grad_y;
    layer.grad_y_pitch = shape.out;
    layer.preactivation = preactivation;
    layer.grad_x = grad_x;
    layer.grad_norm_weight = grads[first];
    layer.grad_norm_bias = grads[first + 1];
    layer.grad_weight = grads[first + 2];
    layer.grad_weight_pitch = shape.in;
    layer.grad_bias = grads[first + 3];
    layer.grad_preactivation = grad_preactivation;
    layer.grad_normalized = grad_normalized;
    few_rows_backward(layer);
  }
};

template <class A>
void forward(const ClassLevelsForward& p) {
  const Levels<A> levels(p.levels);
  const ClassLevelsShape& s = p.levels.shape;
  A* const context = static_cast<A*>(p.context);
  levels.gather();
  if (levels.has_frame()) {
    levels.layer_forward(levels.of_frames(), 0, levels.x, p.frame_preactivation, levels.halves);
    levels.layer_forward(levels.of_pairs(), 4, levels.halves, p.pair_preactivation, context);
  }
  if (!levels.has_global()) return;
  for_each_channels<A>(
      p.levels, [&](int64_t c, int, const auto* convolutions, auto load, auto store) __attribute__((always_inline)) {
        const Clip<A> clip(levels.clips, s.frames);
        for (int64_t batch = 0; batch < s.batch; ++batch) {
          const A* x = levels.x + batch * s.frames * s.dim + c;
          for (int64_t t = 0; t < s.frames; ++t) clip.x[0].set(t, load(x + t * s.dim));
          const Vec<A> level = gelu<A>(clip.mean(convolutions)).value;
          A* to = context + batch * (s.frames / 2) * s.dim + c;
          for (int64_t t = 0; t < s.frames / 2; ++t, to += s.dim)
            store(to, levels.has_frame() ? load(to) + level : level);
        }
      });
}

template <class A>
void frame_level_backward(const ClassLevelsBackward& p, const Levels<A>& levels) {
  const A* preactivation = static_cast<const A*>(p.frame_preactivation);
  parallel_for(levels.rows, p.levels.shape.threads, [&](int64_t row) {
    const int64_t half = p.levels.shape.half, first = row * half;
    for_each_vector<A>(half, [&](int64_t c, auto load, auto store) __attribute__((always_inline)) {
      store(levels.halves + first + c, gelu<A>(load(preactivation + first + c)).value);
    });
  });
  levels.layer_backward(levels.of_pairs(), 4, levels.halves, p.pair_preactivation, p.grad_context, levels.grad_halves,
                        p.grad_frame);
  levels.layer_backward(levels.of_frames(), 0, levels.x, p.frame_preactivation, levels.grad_halves, p.grad_x,
                        p.grad_frame);
}

template <class A>
void backward(const ClassLevelsBackward& p) {
  const Levels<A> levels(p.levels);
  const ClassLevelsShape& s = p.levels.shape;
  levels.gather();
  if (levels.has_frame()) frame_level_backward(p, levels);
  if (!levels.has_global()) return;
  for_each_channels<A>(p.levels, [&](int64_t c, int count, const auto* convolutions, auto load,
                                     auto store) __attribute__((always_inline)) {
    const Clip<A> clip(levels.clips, s.frames);
    LongSum<A> of[kGlobalConvolutions][4];  // of three taps and the bias
    for (int64_t batch = 0; batch < s.batch; ++batch) {
      const A* x = levels.x + batch * s.frames * s.dim + c;
      for (int64_t t = 0; t < s.frames; ++t) clip.x[0].set(t, load(x + t * s.dim));
      const Vec<A> mean = clip.mean(convolutions);
      const A* upstream = static_cast<const A*>(p.grad_context) + batch * (s.frames / 2) * s.dim + c;
      Vec<A> sum = {};
      for (int64_t t = 0; t < s.frames / 2; ++t) sum += load(upstream + t * s.dim);
      Vec<A> of_clip[kGlobalConvolutions][4] = {};
      clip.backward(sum * gelu<A>(mean).slope, convolutions, of_clip);
      for (int k = 0; k < kGlobalConvolutions; ++k)
        for (int j = 0; j < 4; ++j) of[k][j].add(of_clip[k][j]);
      A* to = static_cast<A*>(p.grad_x) + batch * s.frames * s.dim + c;
      for (int64_t t = 0; t < s.frames; ++t, to += s.dim)
        store(to, levels.has_frame() ? load(to) + clip.grad_x[t] : clip.grad_x[t]);
    }
    for (int k = 0; k < kGlobalConvolutions; ++k) {
      for (int tap = 0; tap < 3; ++tap) {
        const Vec<A> total = of[k][tap].total();
        for (int i = 0; i < count; ++i) static_cast<A*>(p.grad_convolutions[2 * k])[(c + i) * 3 + tap] = total[i];
      }
      store(static_cast<A*>(p.grad_convolutions[2 * k + 1]) + c, of[k][3].total());
    }
  });
}

}  // namespace

void class_levels_forward(const ClassLevelsForward& p) {
  p.levels.shape.dtype == DType::float64 ? forward<double>(p) : forward<float>(p);
}

void class_levels_backward(const ClassLevelsBackward& p) {
  p.levels.shape.dtype == DType::float64 ? backward<double>(p) : backward<float>(p);
}

}  // namespace inti::INTI_ISA
