// interpolation_head on the CPU: what comes behind the first Linear's products, one pass over the token pairs each way.
#include "inti/interpolation_head.h"

#include <cmath>

#include "gelu.h"
#include "gemm.h"

namespace inti::INTI_ISA {
namespace {

// A token pair: `pair` of the frames of a clip, `row` over all clips, `own` among the rows of the call.
struct TokenPair {
  int64_t batch, pair, token, row, own;
};

template <class Task>
void for_each_block(const InterpolationHeadShape& shape, const Task& task) {
  for_each_block(shape.first, shape.count, shape.tokens, shape.threads, task);
}

template <class Task>
void for_each_pair(const InterpolationHeadShape& shape, const Block& block, const Task& task) {
  const int64_t pairs = shape.frames / 2;
  for (int64_t k = block.begin; k < block.end; ++k) {
    const int64_t row = block.frame * shape.tokens + k;
    task(TokenPair{block.frame / pairs, block.frame % pairs, k, row, row - shape.first * shape.tokens});
  }
}

// The softmax over two logits of which only the difference is known; each weight by its own quotient, since 1 - α would
// lose a small β's digits. An infinite difference gives NaN, as a logit of +inf does in PyTorch: loss scaling has to
// see that the network has overflowed.
struct PairWeights {
  double first, second;
  explicit PairWeights(double difference) {
    const double nan_or_0 = 0 * difference;
    first = 1 / (1 + std::exp(-difference)) + nan_or_0;
    second = 1 / (1 + std::exp(difference)) + nan_or_0;
  }
};

// Two numbers of a row of pairs, such as the weights.
template <class N>
struct Two {
  using A = wide_t<N>;
  static void write(void* to, int64_t row, A first, A second) {
    Vec<A> both = {};
    both[0] = first;
    both[1] = second;
    store_first(static_cast<N*>(to) + 2 * row, both, 2);
  }
  static A difference(const void* from, int64_t row) {
    const Vec<A> both = load_first(static_cast<const N*>(from) + 2 * row, 2);
    return both[0] - both[1];
  }
};

// --- The hidden layer. N is the network's dtype, P the products' ----------------------------------------------------

// What columns [begin, begin + count) of a token pair's products add to the difference of its logits, lane by lane.
template <class N, class P>
INTI_INLINE Vec<wide_t<N>> difference_of_columns(const InterpolationHeadForward& p, int64_t row, int64_t begin,
                                                 int64_t count, const P* products, Vec<wide_t<N>> sum) {
  using A = wide_t<N>;
  const int64_t hidden = p.shape.hidden, frame = row / p.shape.tokens;
  const A* frame_bias = static_cast<const A*>(p.frame_bias) + frame * p.frame_bias_pitch + begin;
  const A* weight2 = p.weight2 ? static_cast<const A*>(p.weight2) + begin : nullptr;
  N* kept = p.preactivation ? static_cast<N*>(p.preactivation) + row * hidden + begin : nullptr;
  for_each_vector<N>(count, [&](int64_t c, auto load, auto store) __attribute__((always_inline)) {
    const Vec<A> v = load(products + c) + load(frame_bias + c);
    if (kept) store(kept + c, v);
    if (weight2) sum += gelu<N>(v).value * load(weight2 + c);
  });
  return sum;
}

template <class N, class P>
void hidden_backward(const InterpolationHeadBackward& p, const TokenPair& at, wide_t<N> upstream, wide_t<N>* sums) {
  using A = wide_t<N>;
  const int64_t hidden = p.shape.hidden;
  const N* kept = static_cast<const N*>(p.preactivation) + at.row * hidden;
  const A* weight2 = static_cast<const A*>(p.weight2);
  P* grad = static_cast<P*>(p.grad_hidden) + at.own * hidden;
  for_each_vector<N>(hidden, [&](int64_t c, auto load, auto store) __attribute__((always_inline)) {
    const Gelu<A> gelu_at = gelu<N>(load(kept + c));
    const Vec<A> v = upstream * load(weight2 + c) * gelu_at.slope;
    store(grad + c, v);
    if (sums) {
      store(sums + c, load(sums + c) + v);
      store(sums + hidden + c, load(sums + hidden + c) + upstream * gelu_at.value);
    }
  });
}

// --- The interpolation: T is the tokens' dtype
// ------------------------------------------------------------------------

// Σσ·P of the pair's two frames, or null.
template <class A, class Pass>
const A* position_of(const Pass& p, const TokenPair& at) {
  return p.position ? static_cast<const A*>(p.position) + 2 * at.pair * p.shape.dim : nullptr;
}

template <class T>
void interpolate(const InterpolationHeadForward& p, const TokenPair& at, const PairWeights& weights) {
  using A = wide_t<T>;
  const int64_t dim = p.shape.dim;
  const T* x0 = token<T>(p.x, p.x_strides, at.batch, 2 * at.pair, at.token);
  const T* x1 = x0 + p.x_strides.frame;
  const A* position = position_of<A>(p, at);
  T* z = static_cast<T*>(p.z) + at.row * dim;
  const A first = A(weights.first), second = A(weights.second);
  for_each_vector<T>(dim, [&](int64_t c, auto load, auto store) __attribute__((always_inline)) {
    Vec<A> v0 = load(x0 + c), v1 = load(x1 + c);
    if (position) {
      v0 += load(position + c);
      v1 += load(position + dim + c);
    }
    store(z + c, first * v0 + second * v1);
  });
}

// Writes what the token pair gives to grad_x and to the position's sums, and returns Σ_c g·(x0 - x1): the derivative by
// the first weight less that by the second.
template <class T>
wide_t<T> interpolate_backward(const InterpolationHeadBackward& p, const TokenPair& at, const PairWeights& weights,
                               wide_t<T>* sums) {
  using A = wide_t<T>;
  const int64_t dim = p.shape.dim;
  const T* x0 = token<T>(p.x, p.x_strides, at.batch, 2 * at.pair, at.token);
  const T* x1 = x0 + p.x_strides.frame;
  const T* g = token<T>(p.grad_z, p.grad_z_strides, at.batch, at.pair, at.token);
  const A* position = position_of<A>(p, at);
  T* grad_x0 = nullptr;
  if (p.grad_x)
    grad_x0 = static_cast<T*>(p.grad_x) + ((at.batch * p.shape.frames + 2 * at.pair) * p.shape.tokens + at.token) * dim;
  T* grad_x1 = grad_x0 + (p.grad_x ? p.shape.tokens * dim : 0);
  const A first = A(weights.first), second = A(weights.second);
  Vec<A> total = {};
  for_each_vector<T>(dim, [&](int64_t c, auto load, auto store) __attribute__((always_inline)) {
    const Vec<A> upstream = load(g + c), grad0 = first * upstream, grad1 = second * upstream;
    Vec<A> difference = load(x0 + c) - load(x1 + c);
    if (position) difference += load(position + c) - load(position + dim + c);
    total += upstream * difference;
    if (grad_x0) {
      store(grad_x0 + c, p.accumulate ? load(grad_x0 + c) + grad0 : grad0);
      store(grad_x1 + c, p.accumulate ? load(grad_x1 + c) + grad1 : grad1);
    }
    if (sums) {
      store(sums + c, load(sums + c) + grad0);
      store(sums + dim + c, load(sums + dim + c) + grad1);
    }
  });
  return sum_lanes<A>(total);
}

// --- Both
// -------------------------------------------------------------------------------------------------------------

// A block's part of the partial sums [blocks, 2, columns], cleared; null if there are none.
template <class A>
A* sums_of(void* partials, const Block& block, int64_t columns) {
  if (!partials) return nullptr;
  A* sums = static_cast<A*>(partials) + block.number * 2 * columns;
  for (int64_t c = 0; c < 2 * columns; ++c) sums[c] = 0;
  return sums;
}

// Weights and interpolation of a token pair, from the lanes of its logits' difference.
template <class T, class N>
void finish_pair(const InterpolationHeadForward& p, const TokenPair& at, const Vec<wide_t<N>>& sum) {
  using A = wide_t<N>;
  const A difference = sum_lanes<A>(sum) + A(p.bias2);
  const PairWeights weights(difference);
  static_cast<A*>(p.difference)[at.row] = difference;
  Two<N>::write(p.weights, at.row, A(weights.first), A(weights.second));
  interpolate<T>(p, at, weights);
}

template <class T, class N, class P>
void forward(const InterpolationHeadForward& p) {
  const int64_t hidden = p.shape.hidden;
  for_each_block(p.shape, [&](const Block& block) {
    for_each_pair(p.shape, block, [&](const TokenPair& at) {
      const P* products = static_cast<const P*>(p.product) + at.own * hidden;
      finish_pair<T, N>(p, at, difference_of_columns<N>(p, at.row, 0, hidden, products, Vec<wide_t<N>>{}));
    });
  });
}

// Rows [row, row + kTileRows) of a matrix [rows, dim], converted to float.
template <class N>
INTI_INLINE void pack_rows(const void* data, int64_t rows, int64_t dim, int64_t row, float* to, float* scratch) {
  const N* from = static_cast<const N*>(data) + row * dim;
  const int64_t count = least(kTileRows, rows - row);
  if constexpr (sizeof(N) == sizeof(float)) {
    pack_panel<kTileRows>(Lines{from, dim, 1, count, dim}, 0, to);
  } else {
    for (int64_t i = 0; i < count; ++i)
      for_each_vector<N>(dim, [&](int64_t c, auto load, auto store) __attribute__((always_inline)) {
        store(scratch + i * dim + c, load(from + i * dim + c));
      });
    pack_panel<kTileRows>(Lines{scratch, dim, 1, count, dim}, 0, to);
  }
}

template <class T, class N>
void network(const InterpolationHeadNetwork& p) {
  static_assert(kLanes<float> <= kNumbersOfRow, "a row carries a vector");
  const InterpolationHeadShape& s = p.pass.shape;
  const int64_t pairs = s.frames / 2, rows = s.count * s.tokens, depth = p.width + p.context;
  const int64_t part = least(network_columns(s.hidden), s.hidden);
  float* const carried = p.workspace + gemm_workspace(network_columns(s.hidden), depth, s.threads);
  for (int64_t begin = 0; begin < s.hidden; begin += part) {
    const int64_t columns = least(part, s.hidden - begin);
    gemm(
        Lines{p.weight1 + begin * p.weight1_pitch, p.weight1_pitch, 1, columns, depth}, rows, s.threads, p.workspace,
        [&](int64_t row, float* to, float* scratch) {
          pack_rows<N>(p.features, rows, p.width, row, to, scratch);
          if (p.cube) pack_rows<N>(p.cube, rows, p.context, row, to + p.width * kTileRows, scratch);
        },
        [&](int64_t row, int64_t column, int64_t count, const float* products, float* own)
            __attribute__((always_inline)) {
              const Vec<float> before = column ? load(own) : begin ? load(carried + row * kNumbersOfRow) : Vec<float>{};
              store(own, difference_of_columns<N>(p.pass, row, begin + column, count, products, before));
            },
        [&](int64_t row, const float* own) {
          const int64_t frame = row / s.tokens;
          if (begin + columns < s.hidden)
            store(carried + row * kNumbersOfRow, load(own));
          else if (p.pass.weight2)
            finish_pair<T, N>(p.pass, {frame / pairs, frame % pairs, row % s.tokens, row, row}, load(own));
        });
  }
}

template <class T, class N, class P>
void backward(const InterpolationHeadBackward& p) {
  using A = wide_t<T>;
  for_each_block(p.shape, [&](const Block& block) {
    A* position_sums = sums_of<A>(p.position_partials, block, p.shape.dim);
    A* hidden_sums = sums_of<A>(p.hidden_partials, block, p.shape.hidden);
    for_each_pair(p.shape, block, [&](const TokenPair& at) {
      const PairWeights weights(static_cast<const A*>(p.difference)[at.row]);
      const double by_weights =
          double(interpolate_backward<T>(p, at, weights, position_sums)) + Two<N>::difference(p.grad_weights, at.row);
      const A upstream = A(weights.first * weights.second * by_weights);
      static_cast<A*>(p.grad_difference)[at.row] = upstream;
      if (p.grad_hidden) hidden_backward<N, P>(p, at, upstream, hidden_sums);
    });
  });
}

// Calls f with the Types of the tokens, the network and the products.
template <class F>
void by_dtypes(const InterpolationHeadShape& shape, const F& f) {
  by_network(shape.network, shape.product, [&](auto network, auto product) {
    using Wide = wide_t<element_t<decltype(network)>>;
    by_dtype(shape.dtype, [&](auto x) {
      if constexpr (sizeof(wide_t<element_t<decltype(x)>>) == sizeof(Wide)) f(x, network, product);
    });
  });
}

}  // namespace

void interpolation_head_forward(const InterpolationHeadForward& p) {
  by_dtypes(p.shape, [&](auto x, auto network, auto product) {
    forward<element_t<decltype(x)>, element_t<decltype(network)>, element_t<decltype(product)>>(p);
  });
}

void interpolation_head_network(const InterpolationHeadNetwork& p) {
  by_narrow_dtypes(p.pass.shape.dtype, p.pass.shape.network, [&](auto x, auto of_network) {
    network<element_t<decltype(x)>, element_t<decltype(of_network)>>(p);
  });
}

void interpolation_head_backward(const InterpolationHeadBackward& p) {
  by_dtypes(p.shape, [&](auto x, auto network, auto product) {
    backward<element_t<decltype(x)>, element_t<decltype(network)>, element_t<decltype(product)>>(p);
  });
}

}  // namespace inti::INTI_ISA
