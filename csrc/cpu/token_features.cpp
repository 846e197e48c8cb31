// token_features on the CPU: the passes around the Linear's products. All are limited by memory: a row is read once and
// stays in the first cache while it is worked on.
#include "inti/token_features.h"

#include "gelu.h"
#include "gemm.h"
#include "layer_norm.h"

namespace inti::INTI_ISA {
namespace {

template <class Task>
void for_each_block(const TokenFeaturesShape& shape, const Task& task) {
  for_each_block(shape.first, shape.count, shape.tokens, shape.threads, task);
}

// A frame's tokens as the LayerNorm sees them: x + position.
template <class T>
struct FrameOfTokens {
  using A = wide_t<T>;
  const T* x;
  int64_t stride;
  const A* position;

  template <class Pass>
  FrameOfTokens(const Pass& p, int64_t frame)
      : x(token<T>(p.x, p.x_strides, frame / p.shape.frames, frame % p.shape.frames, 0)),
        stride(p.x_strides.token),
        position(p.position ? static_cast<const A*>(p.position) + frame % p.shape.frames * p.shape.dim : nullptr) {}

  template <class Load>
  __attribute__((always_inline)) Vec<A> at(int64_t k, int64_t c, const Load& load) const {
    const Vec<A> v = load(x + k * stride + c);
    return position ? v + load(position + c) : v;
  }
};

// Token k of a frame, normalised, to out [dim].
template <class T, class P>
void normalize_token(const TokenFeaturesNormalize& p, const FrameOfTokens<T>& frame, int64_t of_all, int64_t k,
                     P* out) {
  using A = wide_t<T>;
  const int64_t dim = p.shape.dim;
  const A* norm_weight = static_cast<const A*>(p.norm_weight);
  const A* norm_bias = static_cast<const A*>(p.norm_bias);
  A* kept = static_cast<A*>(p.statistics) + 2 * (of_all * p.shape.tokens + k);
  if (!p.have_statistics) {
    const Statistics<A> now = statistics_of<T>(
        [&](int64_t c, const auto& load) __attribute__((always_inline)) { return frame.at(k, c, load); }, dim, p.eps);
    kept[0] = now.mean;
    kept[1] = now.scale;
  }
  const A mean = kept[0], scale = kept[1];
  for_each_vector<T>(dim, [&](int64_t c, auto load, auto store) __attribute__((always_inline)) {
    const Vec<A> v = (frame.at(k, c, load) - mean) * scale;
    store(out + c, v * load(norm_weight + c) + load(norm_bias + c));
  });
}

template <class T, class P>
void normalize(const TokenFeaturesNormalize& p) {
  const int64_t dim = p.shape.dim, tokens = p.shape.tokens;
  for_each_block(p.shape, [&](const Block& block) {
    const FrameOfTokens<T> frame(p, block.frame);
    P* out = static_cast<P*>(p.normalized) + (block.frame - p.shape.first) * tokens * dim;
    for (int64_t k = block.begin; k < block.end; ++k) normalize_token(p, frame, block.frame, k, out + k * dim);
  });
}

// Where a token's features are: with those of the pair's other frame in one row.
int64_t features_at(const TokenFeaturesShape& shape, int64_t frame, int64_t k, int64_t pitch) {
  return (frame / 2 * shape.tokens + k) * pitch + frame % 2 * shape.width;
}

// Columns [begin, begin + count) of a token's products, to its features and to what is kept of it.
template <class N, class P>
INTI_INLINE void activate(const TokenFeaturesActivation& p, int64_t frame, int64_t k, int64_t begin, int64_t count,
                          const P* products) {
  using A = wide_t<N>;
  const int64_t width = p.shape.width;
  const A* bias = p.bias ? static_cast<const A*>(p.bias) + begin : nullptr;
  N* features = static_cast<N*>(p.features) + features_at(p.shape, frame, k, 2 * width) + begin;
  N* kept = p.preactivation ? static_cast<N*>(p.preactivation) + (frame * p.shape.tokens + k) * width + begin : nullptr;
  for_each_vector<N>(count, [&](int64_t c, auto load, auto store) __attribute__((always_inline)) {
    Vec<A> v = load(products + c);
    if (bias) v += load(bias + c);
    if (kept) store(kept + c, v);
    store(features + c, gelu<N>(v).value);
  });
}

template <class N, class P>
void activation(const TokenFeaturesActivation& p) {
  const int64_t width = p.shape.width, tokens = p.shape.tokens;
  for_each_block(p.shape, [&](const Block& block) {
    const P* products = static_cast<const P*>(p.product) + (block.frame - p.shape.first) * tokens * width;
    for (int64_t k = block.begin; k < block.end; ++k) activate<N>(p, block.frame, k, 0, width, products + k * width);
  });
}

template <class T, class N>
void forward(const TokenFeaturesForward& p) {
  const TokenFeaturesShape& s = p.norm.shape;
  const int64_t rows = s.count * s.tokens;
  gemm(
      Lines{p.weight, s.dim, 1, s.width, s.dim}, rows, s.threads, p.workspace,
      [&](int64_t row, float* to, float* scratch) {
        const int64_t count = least(kTileRows, rows - row);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t frame = (row + i) / s.tokens;
          normalize_token(p.norm, FrameOfTokens<T>(p.norm, frame), frame, (row + i) % s.tokens, scratch + i * s.dim);
        }
        pack_panel<kTileRows>(Lines{scratch, s.dim, 1, count, s.dim}, 0, to);
      },
      [&](int64_t row, int64_t column, int64_t count, const float* sums, float*) __attribute__((always_inline)) {
        activate<N>(p.activation, row / s.tokens, row % s.tokens, column, count, sums);
      },
      [](int64_t, float*) {});
}

template <class N, class P>
void activation_backward(const TokenFeaturesActivationBackward& p) {
  using A = wide_t<N>;
  const int64_t width = p.shape.width, tokens = p.shape.tokens;
  for_each_block(p.shape, [&](const Block& block) {
    A* sum = p.partials ? static_cast<A*>(p.partials) + block.number * width : nullptr;
    if (sum)
      for (int64_t c = 0; c < width; ++c) sum[c] = 0;
    for (int64_t k = block.begin; k < block.end; ++k) {
      const N* upstream =
          static_cast<const N*>(p.grad_features) + features_at(p.shape, block.frame, k, p.grad_features_pitch);
      const N* kept = static_cast<const N*>(p.preactivation) + (block.frame * tokens + k) * width;
      P* grad = static_cast<P*>(p.grad_preactivation) + ((block.frame - p.shape.first) * tokens + k) * width;
      for_each_vector<N>(width, [&](int64_t c, auto load, auto store) __attribute__((always_inline)) {
        const Vec<A> v = load(upstream + c) * gelu<N>(load(kept + c)).slope;
        store(grad + c, v);
        if (sum) store(sum + c, load(sum + c) + v);
      });
    }
  });
}

// With g the gradient of the normalised row y times norm_weight, and y without norm_weight and norm_bias:
// dx = (g - mean(g) - y·mean(g·y)) / σ.
template <class T, class P>
void norm_backward(const TokenFeaturesNormBackward& p) {
  using A = wide_t<T>;
  const int64_t dim = p.shape.dim, tokens = p.shape.tokens;
  const A* norm_weight = static_cast<const A*>(p.norm_weight);
  for_each_block(p.shape, [&](const Block& block) {
    const FrameOfTokens<T> frame(p, block.frame);
    A* sums = p.partials ? static_cast<A*>(p.partials) + block.number * 3 * dim : nullptr;
    if (sums)
      for (int64_t c = 0; c < 3 * dim; ++c) sums[c] = 0;
    for (int64_t k = block.begin; k < block.end; ++k) {
      const int64_t row = block.frame * tokens + k;
      const A mean = static_cast<const A*>(p.statistics)[2 * row],
              scale = static_cast<const A*>(p.statistics)[2 * row + 1];
      const P* upstream = static_cast<const P*>(p.grad_normalized) + (row - p.shape.first * tokens) * dim;
      Vec<A> of_g = {}, of_gy = {};
      for_each_vector<T>(dim, [&](int64_t c, auto load, auto store) __attribute__((always_inline)) {
        const Vec<A> y = (frame.at(k, c, load) - mean) * scale, of_row = load(upstream + c);
        const Vec<A> g = of_row * load(norm_weight + c);
        of_g += g;
        of_gy += g * y;
        if (sums) {
          store(sums + c, load(sums + c) + of_row * y);
          store(sums + dim + c, load(sums + dim + c) + of_row);
        }
      });
      const A mean_g = sum_lanes<A>(of_g) / A(dim), mean_gy = sum_lanes<A>(of_gy) / A(dim);
      T* grad_x = p.grad_x ? static_cast<T*>(p.grad_x) + row * dim : nullptr;
      for_each_vector<T>(dim, [&](int64_t c, auto load, auto store) __attribute__((always_inline)) {
        const Vec<A> y = (frame.at(k, c, load) - mean) * scale, g = load(upstream + c) * load(norm_weight + c);
        const Vec<A> grad = (g - mean_g - y * mean_gy) * scale;
        if (sums) store(sums + 2 * dim + c, load(sums + 2 * dim + c) + grad);
        if (grad_x) store(grad_x + c, p.accumulate ? load(grad_x + c) + grad : grad);
      });
    }
  });
}

}  // namespace

void token_features_normalize(const TokenFeaturesNormalize& p) {
  by_two_dtypes(p.shape.dtype, p.shape.product,
                [&](auto x, auto product) { normalize<element_t<decltype(x)>, element_t<decltype(product)>>(p); });
}

void token_features_activation(const TokenFeaturesActivation& p) {
  by_network(p.shape.network, p.shape.product, [&](auto network, auto product) {
    activation<element_t<decltype(network)>, element_t<decltype(product)>>(p);
  });
}

void token_features_forward(const TokenFeaturesForward& p) {
  by_narrow_dtypes(p.norm.shape.dtype, p.norm.shape.network,
                   [&](auto x, auto network) { forward<element_t<decltype(x)>, element_t<decltype(network)>>(p); });
}

void token_features_activation_backward(const TokenFeaturesActivationBackward& p) {
  by_network(p.shape.network, p.shape.product, [&](auto network, auto product) {
    activation_backward<element_t<decltype(network)>, element_t<decltype(product)>>(p);
  });
}

void token_features_norm_backward(const TokenFeaturesNormBackward& p) {
  by_two_dtypes(p.shape.dtype, p.shape.product,
                [&](auto x, auto product) { norm_backward<element_t<decltype(x)>, element_t<decltype(product)>>(p); });
}

}  // namespace inti::INTI_ISA
