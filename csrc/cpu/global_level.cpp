// The global level, a vector of channels at a time: all frames of a clip stay in the first cache, and the backward
// computes them again.
#include "inti/global_level.h"

#include "gelu.h"
#include "rows.h"

namespace inti::INTI_ISA {
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
template <class A, class Pass, class Block>
void for_each_channels(const Pass& p, const Block& block) {
  const int64_t dim = p.shape.dim;
  parallel_for(parts_of(dim, kChannels), p.shape.threads, [&](int64_t i) {
    const int64_t begin = i * kChannels, size = least(kChannels, dim - begin);
    for_each_vector<A>(size, [&](int64_t at, auto load, auto store) __attribute__((always_inline)) {
      const int64_t c = begin + at;
      const int count = int(least(kLanes<A>, dim - c));
      const auto convolution = [&](int k) __attribute__((always_inline)) {
        return Convolution<A>(static_cast<const A*>(p.weights[k]), static_cast<const A*>(p.biases[k]), c, count);
      };
      const Convolution<A> convolutions[kGlobalConvolutions] = {convolution(0), convolution(1), convolution(2)};
      block(c, count, convolutions, load, store);
    });
  });
}

template <class A>
void forward(const GlobalLevelForward& p) {
  const GlobalLevelShape& s = p.shape;
  for_each_channels<A>(
      p, [&](int64_t c, int, const auto* convolutions, auto load, auto store) __attribute__((always_inline)) {
        const Clip<A> clip(p.workspace, s.frames);
        for (int64_t batch = 0; batch < s.batch; ++batch) {
          const A* x = static_cast<const A*>(p.x) + batch * s.frames * s.dim + c;
          for (int64_t t = 0; t < s.frames; ++t) clip.x[0].set(t, load(x + t * s.dim));
          const Vec<A> level = gelu<A>(clip.mean(convolutions)).value;
          A* to = static_cast<A*>(p.context) + batch * (s.frames / 2) * s.dim + c;
          for (int64_t t = 0; t < s.frames / 2; ++t, to += s.dim) store(to, p.accumulate ? load(to) + level : level);
        }
      });
}

template <class A>
void backward(const GlobalLevelBackward& p) {
  const GlobalLevelShape& s = p.shape;
  for_each_channels<A>(
      p, [&](int64_t c, int count, const auto* convolutions, auto load, auto store) __attribute__((always_inline)) {
        const Clip<A> clip(p.workspace, s.frames);
        LongSum<A> of[kGlobalConvolutions][4];  // of three taps and the bias
        for (int64_t batch = 0; batch < s.batch; ++batch) {
          const A* x = static_cast<const A*>(p.x) + batch * s.frames * s.dim + c;
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
            store(to, p.accumulate ? load(to) + clip.grad_x[t] : clip.grad_x[t]);
        }
        for (int k = 0; k < kGlobalConvolutions; ++k) {
          for (int tap = 0; tap < 3; ++tap) {
            const Vec<A> total = of[k][tap].total();
            for (int i = 0; i < count; ++i) static_cast<A*>(p.grad_weights[k])[(c + i) * 3 + tap] = total[i];
          }
          store(static_cast<A*>(p.grad_biases[k]) + c, of[k][3].total());
        }
      });
}

}  // namespace

void global_level_forward(const GlobalLevelForward& p) {
  p.shape.dtype == DType::float64 ? forward<double>(p) : forward<float>(p);
}

void global_level_backward(const GlobalLevelBackward& p) {
  p.shape.dtype == DType::float64 ? backward<double>(p) : backward<float>(p);
}

}  // namespace inti::INTI_ISA
