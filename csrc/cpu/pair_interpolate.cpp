// pair_interpolate on the CPU: one pass over the tokens forward, one backward; both are limited by memory.
#include "inti/pair_interpolate.h"

#include <cmath>

#include "parallel.h"
#include "rows.h"

namespace inti::INTI_ISA {
namespace {

// A chunk of tokens of one pair of frames: the unit of work, and of grad_position's partial sums.
struct Chunk {
  int64_t batch, pair, index, begin, end;
};

Chunk chunk_of(const PairInterpolateShape& shape, int64_t task) {
  const int64_t chunks = pair_interpolate_chunks(shape.tokens);
  const int64_t index = task % chunks, frame = task / chunks, begin = index * 32;
  const int64_t end = begin + 32 < shape.tokens ? begin + 32 : shape.tokens;
  return {frame / (shape.frames / 2), frame % (shape.frames / 2), index, begin, end};
}

template <class Task>
void for_each_chunk(const PairInterpolateShape& shape, const Task& task) {
  const int64_t chunks = shape.batch * (shape.frames / 2) * pair_interpolate_chunks(shape.tokens);
  parallel_for(chunks, shape.threads, [&](int64_t i) { task(chunk_of(shape, i)); });
}

// The softmax over two logits: the larger one's exponential is 1, so any finite logits give finite weights. An infinite
// one gives NaN, as PyTorch's softmax does: loss scaling has to see that the network has overflowed.
struct PairWeights {
  double first, second;
  explicit PairWeights(const double* logits) {
    const double largest = logits[0] > logits[1] ? logits[0] : logits[1];
    const double e0 = std::exp(logits[0] - largest), e1 = std::exp(logits[1] - largest);
    first = e0 / (e0 + e1);
    second = e1 / (e0 + e1);
  }
};

template <class T>
void forward(const PairInterpolateForward& p) {
  using A = wide_t<T>;
  const int64_t dim = p.shape.dim;
  for_each_chunk(p.shape, [&](const Chunk& chunk) {
    const A* position0 = static_cast<const A*>(p.position) + (p.position ? 2 * chunk.pair * dim : 0);
    const A* position1 = position0 + (p.position ? dim : 0);
    for (int64_t k = chunk.begin; k < chunk.end; ++k) {
      const int64_t out = (chunk.batch * (p.shape.frames / 2) + chunk.pair) * p.shape.tokens + k;
      const T* x0 = token<T>(p.x, p.x_strides, chunk.batch, 2 * chunk.pair, k);
      const T* x1 = x0 + p.x_strides.frame;
      T* z = static_cast<T*>(p.z) + out * dim;
      const PairWeights weights(p.logits + 2 * out);
      p.weights[2 * out] = weights.first;
      p.weights[2 * out + 1] = weights.second;
      const A first = A(weights.first), second = A(weights.second);
      for_each_vector<T>(dim, [&](int64_t c, auto load, auto store) __attribute__((always_inline)) {
        Vec<A> v0 = load(x0 + c), v1 = load(x1 + c);
        if (p.position) {
          v0 += load(position0 + c);
          v1 += load(position1 + c);
        }
        store(z + c, first * v0 + second * v1);
      });
    }
  });
}

template <class T>
struct Backward {
  using A = wide_t<T>;
  const PairInterpolateBackward& p;

  // Σ_c g·(x0 − x1): the derivative by the first weight less that by the second.
  A weight_difference(const T* g, const T* x0, const T* x1, const A* position0, const A* position1) const {
    // Two sums side by side hide the addition's latency.
    Vec<A> sums[2] = {};
    int64_t block = 0;
    for_each_vector<T>(p.shape.dim, [&](int64_t c, auto load, auto) __attribute__((always_inline)) {
      Vec<A> difference = load(x0 + c) - load(x1 + c);
      if (p.position) difference += load(position0 + c) - load(position1 + c);
      sums[block++ & 1] += load(g + c) * difference;
    });
    return sum_lanes<A>(sums[0] + sums[1]);
  }

  void frame(const T* g, A weight, T* grad_x, A* partial) const {
    for_each_vector<T>(p.shape.dim, [&](int64_t c, auto load, auto store) __attribute__((always_inline)) {
      const Vec<A> grad = weight * load(g + c);
      if (partial) store(partial + c, load(partial + c) + grad);
      if (grad_x) store(grad_x + c, p.accumulate ? load(grad_x + c) + grad : grad);
    });
  }

  void operator()(const Chunk& chunk) const {
    const int64_t dim = p.shape.dim, frames = p.shape.frames, tokens = p.shape.tokens;
    const A* position0 = static_cast<const A*>(p.position) + (p.position ? 2 * chunk.pair * dim : 0);
    const A* position1 = position0 + (p.position ? dim : 0);
    A* partial = nullptr;
    if (p.grad_position) {
      const int64_t row = (chunk.batch * pair_interpolate_chunks(tokens) + chunk.index) * frames + 2 * chunk.pair;
      partial = static_cast<A*>(p.partials) + row * dim;
      for (int64_t c = 0; c < 2 * dim; ++c) partial[c] = 0;
    }
    for (int64_t k = chunk.begin; k < chunk.end; ++k) {
      const int64_t out = (chunk.batch * (frames / 2) + chunk.pair) * tokens + k;
      const T* g = token<T>(p.grad_z, p.grad_z_strides, chunk.batch, chunk.pair, k);
      const PairWeights weights(p.logits + 2 * out);
      if (p.grad_logits) {
        const T* x0 = token<T>(p.x, p.x_strides, chunk.batch, 2 * chunk.pair, k);
        double difference = weight_difference(g, x0, x0 + p.x_strides.frame, position0, position1);
        difference += p.grad_weights[2 * out] - p.grad_weights[2 * out + 1];
        p.grad_logits[2 * out] = weights.first * weights.second * difference;
        p.grad_logits[2 * out + 1] = -p.grad_logits[2 * out];
      }
      if (!p.grad_x && !partial) continue;
      T* grad_x0 = nullptr;
      T* grad_x1 = nullptr;
      if (p.grad_x) {
        grad_x0 = static_cast<T*>(p.grad_x) + ((chunk.batch * frames + 2 * chunk.pair) * tokens + k) * dim;
        grad_x1 = grad_x0 + tokens * dim;
      }
      frame(g, A(weights.first), grad_x0, partial);
      frame(g, A(weights.second), grad_x1, partial ? partial + dim : nullptr);
    }
  }
};

// grad_position[t] = Σ over clips and chunks, in that order.
template <class A>
void reduce_position(const PairInterpolateBackward& p) {
  const int64_t row = p.shape.frames * p.shape.dim;
  const int64_t rows = p.shape.batch * pair_interpolate_chunks(p.shape.tokens);
  parallel_for(p.shape.frames, p.shape.threads, [&](int64_t frame) {
    const A* partials = static_cast<const A*>(p.partials) + frame * p.shape.dim;
    A* grad = static_cast<A*>(p.grad_position) + frame * p.shape.dim;
    for (int64_t c = 0; c < p.shape.dim; ++c) grad[c] = 0;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < p.shape.dim; ++c) grad[c] += partials[i * row + c];
  });
}

}  // namespace

void pair_interpolate_forward(const PairInterpolateForward& p) {
  by_dtype(p.shape.dtype, [&](auto type) { forward<typename decltype(type)::type>(p); });
}

void pair_interpolate_backward(const PairInterpolateBackward& p) {
  by_dtype(p.shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for_each_chunk(p.shape, Backward<T>{p});
    if (p.grad_position) reduce_position<wide_t<T>>(p);
  });
}

}  // namespace inti::INTI_ISA
