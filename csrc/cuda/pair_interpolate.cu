// pair_interpolate: softmax of each token pair's two logits, and the sum of its frames by it, in one pass; and back.
// The kernels are interpolate.h's.
#include "inti/cuda/pair_interpolate.h"

#include "interpolate.h"

namespace inti::cuda {

// Weights from two logits. S: float, or double where x or the logits are.
template <class S>
struct Logits {
  using Softmax = S;
  DType dtype;
  const void* logits;        // [batch, frames/2, tokens, 2]
  void* stored;              // the weights, forward
  const void* grad_weights;  // backward
  void* grad_logits;         // backward, or null

  __device__ __forceinline__ PairWeights<S> weights(int64_t pair) const {
    const S first = read<S>(logits, dtype, 2 * pair), second = read<S>(logits, dtype, 2 * pair + 1);
    const S largest = first > second ? first : second;
    const S a = exponential(first - largest), b = exponential(second - largest);
    return {a / (a + b), b / (a + b)};
  }
  __device__ __forceinline__ void store_weights(int64_t pair, const PairWeights<S>& both) const {
    write(stored, dtype, 2 * pair, both.first);
    write(stored, dtype, 2 * pair + 1, both.second);
  }
  __device__ __forceinline__ bool wants_gradient() const { return grad_logits; }
  __device__ __forceinline__ S grad_difference(int64_t pair) const {
    return read<S>(grad_weights, dtype, 2 * pair) - read<S>(grad_weights, dtype, 2 * pair + 1);
  }
  __device__ __forceinline__ void store_gradient(int64_t pair, S gradient) const {
    write(grad_logits, dtype, 2 * pair, gradient);
    write(grad_logits, dtype, 2 * pair + 1, -gradient);
  }
};

#ifndef __CUDACC_RTC__

template <class T, class S>
void forward(const PairInterpolateForward& p) {
  InterpolateForward q{};
  q.frames = p.shape.frames;
  q.tokens = p.shape.tokens;
  q.dim = p.shape.dim;
  q.x = p.x;
  q.x_strides = p.x_strides;
  q.position = p.position;
  q.z = p.z;
  const Logits<S> source{p.shape.logits_dtype, p.logits, p.weights, nullptr, nullptr};
  interpolate_forward<T>(q, p.shape.batch, source, p.stream);
}

template <class T, class S>
void backward(const PairInterpolateBackward& p) {
  InterpolateBackward q{};
  q.frames = p.shape.frames;
  q.tokens = p.shape.tokens;
  q.dim = p.shape.dim;
  q.x = p.x;
  q.x_strides = p.x_strides;
  q.position = p.position;
  q.grad_z = p.grad_z;
  q.grad_z_strides = p.grad_z_strides;
  q.grad_x = p.grad_x;
  q.accumulate = p.accumulate;
  q.partials = p.partials;
  const Logits<S> source{p.shape.logits_dtype, p.logits, nullptr, p.grad_weights, p.grad_logits};
  SumList sums(p.shape.dtype, p.stream);
  interpolate_backward<T>(q, p.shape.batch, p.grad_position, source, sums, p.stream);
  sums.launch();
}

// Calls f with numbers of x's type and of the softmax's.
template <class F>
void with_types(const PairInterpolateShape& shape, F f) {
  with_dtype(shape.dtype, [&](auto x) {
    using T = decltype(x);
    if constexpr (!std::is_same_v<T, double>) {
      if (shape.logits_dtype != DType::float64) return f(x, float{});
    }
    f(x, double{});
  });
}

void pair_interpolate_forward(const PairInterpolateForward& p) {
  with_types(p.shape, [&](auto x, auto softmax) { forward<decltype(x), decltype(softmax)>(p); });
}

void pair_interpolate_backward(const PairInterpolateBackward& p) {
  with_types(p.shape, [&](auto x, auto softmax) { backward<decltype(x), decltype(softmax)>(p); });
}

#endif  // __CUDACC_RTC__

}  // namespace inti::cuda
