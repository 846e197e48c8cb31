// What is right: the equations as plain loops over doubles, with the error that the kernels' precision may make of
// them. Names and layouts are those of csrc/include/inti/cuda; x stands for x + position. A null Input isn't there.
#pragma once

#include <algorithm>
#include <vector>

#include "tensors.h"

namespace standalone::reference {

using Values = std::vector<Bounded>;

// `zeros_exact`: what is known to be 0 must be.
inline Values stored(Values numbers, DType dtype, bool zeros_exact = false) {
  for (Bounded& number : numbers)
    if (!zeros_exact || number.value != 0 || number.error != 0) number = standalone::stored(number, dtype);
  return numbers;
}
// What lies in memory.
inline Values exactly(const std::vector<double>& numbers) {
  Values exact;
  for (const double number : numbers) exact.push_back({number, 0});
  return exact;
}
// A gradient that is added to what a buffer of dtype holds. It may be rounded before, as autograd itself does.
inline void add_to(Values& gradient, const std::vector<double>& before, DType dtype, const Arithmetic& with) {
  for (size_t i = 0; i < gradient.size(); ++i)
    gradient[i] = with.add(standalone::stored(gradient[i], dtype), with.exact(before[i]));
}

inline double position_at(const Input* position, const TokenSizes& s, int64_t frame, int64_t channel) {
  return position ? (*position)[frame * s.dim + channel] : 0;
}
inline Bounded with_position(const Tokens& x, const Input* position, int64_t b, int64_t t, int64_t n, int64_t c,
                             const Arithmetic& with) {
  const Bounded token = with.exact(x.at(b, t, n, c));
  return position ? with.add(token, with.exact(position_at(position, x.sizes, t, c))) : token;
}

// Tokens that are computed themselves, [batch, frames, tokens, dim], and have no position.
struct Computed {
  TokenSizes sizes;
  Values values;
};
inline Bounded with_position(const Computed& x, const Input*, int64_t b, int64_t t, int64_t n, int64_t c,
                             const Arithmetic&) {
  return x.values[static_cast<size_t>(x.sizes.at(b, t, n, c))];
}

// --- The interpolation of a pair of frames -------------------------------------------------------------------------

struct PairWeights {
  Bounded first, second;
};
// Of the difference of the two logits.
inline PairWeights weights_of(Bounded difference, const Arithmetic& with) {
  return {with.sigmoid(difference), with.sigmoid({-difference.value, difference.error})};
}

// z[b, j, n] = α·x[b, 2j, n] + β·x[b, 2j+1, n].
inline Values interpolate(const Tokens& x, const Input* position, const std::vector<PairWeights>& weights,
                          const Arithmetic& with) {
  const TokenSizes& s = x.sizes;
  Values z;
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t j = 0; j < s.frames / 2; ++j)
      for (int64_t n = 0; n < s.tokens; ++n) {
        const PairWeights& w = weights[static_cast<size_t>((b * (s.frames / 2) + j) * s.tokens + n)];
        for (int64_t c = 0; c < s.dim; ++c)
          z.push_back(with.add(with.multiply(w.first, with_position(x, position, b, 2 * j, n, c, with)),
                               with.multiply(w.second, with_position(x, position, b, 2 * j + 1, n, c, with))));
      }
  return z;
}

struct InterpolationGradients {
  Values x;           // [batch, frames, tokens, dim]
  Values position;    // [frames, dim]
  Values difference;  // [pairs]: of the first logit less the second
};

// ∂/∂δ of α = σ(δ) is αβ, and of β = 1 - α its negative.
inline InterpolationGradients interpolate_backward(const Tokens& x, const Input* position,
                                                   const std::vector<PairWeights>& weights, const Tokens& grad_z,
                                                   const Input& grad_weights, const Arithmetic& with) {
  const TokenSizes& s = x.sizes;
  InterpolationGradients gradients;
  gradients.x.resize(static_cast<size_t>(s.size()));
  std::vector<Sum> over_tokens(static_cast<size_t>(s.frames * s.dim));
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t j = 0; j < s.frames / 2; ++j)
      for (int64_t n = 0; n < s.tokens; ++n) {
        const int64_t pair = (b * (s.frames / 2) + j) * s.tokens + n;
        const PairWeights& w = weights[static_cast<size_t>(pair)];
        Sum sum;
        for (int64_t c = 0; c < s.dim; ++c) {
          const double g = grad_z.at(b, j, n, c);
          for (int64_t k = 0; k < 2; ++k) {
            const int64_t t = 2 * j + k;
            const double sign = k ? -1 : 1;
            sum.add_product(g, sign * x.at(b, t, n, c));
            if (position) sum.add_product(g, sign * position_at(position, s, t, c));
            const Bounded grad = with.multiply(k ? w.second : w.first, with.exact(g));
            gradients.x[static_cast<size_t>(s.at(b, t, n, c))] = grad;
            over_tokens[static_cast<size_t>(t * s.dim + c)].add(grad);
          }
        }
        sum.add_product(1, grad_weights[2 * pair]);
        sum.add_product(-1, grad_weights[2 * pair + 1]);
        gradients.difference.push_back(with.multiply(with.multiply(w.first, w.second), sum.total(with)));
      }
  for (const Sum& sum : over_tokens) gradients.position.push_back(sum.total(with));
  return gradients;
}

// --- The depthwise convolution -------------------------------------------------------------------------------------

struct Convolution {
  int64_t temporal_stride, prefix, height, width;
  int space;  // 3 or 1: the kernel is 3 × space × space
  int64_t taps() const { return int64_t{3} * space * space; }

  // Calls f(tap, frame of x, token of x, output frame, output token) for each pair that a tap joins.
  template <class F>
  void for_each(int64_t frames, F f) const {
    const int halo = space / 2;
    for (int64_t j = 0; j < frames / temporal_stride; ++j)
      for (int64_t time = 0; time < 3; ++time) {
        const int64_t t = temporal_stride * j + time - 1;
        if (t < 0 || t >= frames) continue;
        for (int64_t h = 0; h < height; ++h)
          for (int64_t w = 0; w < width; ++w)
            for (int down = 0; down < space; ++down)
              for (int right = 0; right < space; ++right) {
                const int64_t row = h + down - halo, column = w + right - halo;
                if (row < 0 || row >= height || column < 0 || column >= width) continue;
                f((time * space + down) * space + right, t, prefix + row * width + column, j, prefix + h * width + w);
              }
      }
  }
};

// What the convolution reads: x + position is rounded to x's dtype, as the reference in Python has it.
inline Values convolved_tokens(const Tokens& x, const Input* position, const Arithmetic& with) {
  const TokenSizes& s = x.sizes;
  Values tokens;
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t t = 0; t < s.frames; ++t)
      for (int64_t n = 0; n < s.tokens; ++n)
        for (int64_t c = 0; c < s.dim; ++c) {
          const Bounded token = with_position(x, position, b, t, n, c, with);
          tokens.push_back(position ? stored(token, x.array.dtype()) : token);
        }
  return tokens;
}

inline Bounded times(Bounded a, double b) { return {a.value * b, a.error * std::fabs(b)}; }

// y [batch, frames/stride, tokens, dim]; prefix tokens are exactly 0.
inline Values convolve(const Convolution& conv, const Tokens& x, const Input* position, const Input& weight,
                       const Input* bias, const Arithmetic& with) {
  const TokenSizes& s = x.sizes;
  const Values tokens = convolved_tokens(x, position, with);
  const TokenSizes out{s.batch, s.frames / conv.temporal_stride, s.tokens, s.dim};
  std::vector<Sum> sums(static_cast<size_t>(out.size()));
  for (int64_t b = 0; b < s.batch; ++b)
    conv.for_each(s.frames, [&](int64_t tap, int64_t t, int64_t from, int64_t j, int64_t to) {
      for (int64_t c = 0; c < s.dim; ++c)
        sums[static_cast<size_t>(out.at(b, j, to, c))].add(
            times(tokens[static_cast<size_t>(s.at(b, t, from, c))], weight[c * conv.taps() + tap]));
    });
  Values y;
  for (size_t i = 0; i < sums.size(); ++i) {
    const int64_t place = static_cast<int64_t>(i);
    const bool patch = place / s.dim % s.tokens >= conv.prefix;
    if (patch && bias) sums[i].add_product(1, (*bias)[place % s.dim]);
    y.push_back(patch ? sums[i].total(with) : Bounded{});
  }
  return y;
}

struct ConvolutionGradients {
  Values x, position, weight, bias;
};

inline ConvolutionGradients convolve_backward(const Convolution& conv, const Tokens& x, const Input* position,
                                              const Input& weight, const Tokens& grad_y, const Arithmetic& with) {
  const TokenSizes &s = x.sizes, &out = grad_y.sizes;
  const Values tokens = convolved_tokens(x, position, with);
  std::vector<Sum> of_x(static_cast<size_t>(s.size())), of_position(static_cast<size_t>(s.frames * s.dim)),
      of_weight(static_cast<size_t>(s.dim * conv.taps())), of_bias(static_cast<size_t>(s.dim));
  for (int64_t b = 0; b < s.batch; ++b)
    conv.for_each(s.frames, [&](int64_t tap, int64_t t, int64_t from, int64_t j, int64_t to) {
      for (int64_t c = 0; c < s.dim; ++c) {
        const double g = grad_y.at(b, j, to, c);
        const size_t token = static_cast<size_t>(s.at(b, t, from, c)),
                     parameter = static_cast<size_t>(c * conv.taps() + tap);
        of_x[token].add_product(g, weight[c * conv.taps() + tap]);
        of_position[static_cast<size_t>(t * s.dim + c)].add_product(g, weight[c * conv.taps() + tap]);
        of_weight[parameter].add(times(tokens[token], g));
      }
    });
  for (int64_t b = 0; b < out.batch; ++b)
    for (int64_t j = 0; j < out.frames; ++j)
      for (int64_t n = conv.prefix; n < out.tokens; ++n)
        for (int64_t c = 0; c < out.dim; ++c) of_bias[static_cast<size_t>(c)].add_product(1, grad_y.at(b, j, n, c));
  const auto totals = [&](const std::vector<Sum>& sums) {
    Values values;
    for (const Sum& sum : sums) values.push_back(sum.terms ? sum.total(with) : Bounded{});
    return values;
  };
  return {totals(of_x), totals(of_position), totals(of_weight), totals(of_bias)};
}

// --- LayerNorm → Linear → GELU -------------------------------------------------------------------------------------

// Mean and 1/√(variance + eps) of each row [rows, 2]. X, here and below, is Tokens or Computed.
template <class X>
Values statistics(const X& x, const Input* position, double eps, const Arithmetic& with) {
  const TokenSizes& s = x.sizes;
  const double dim = static_cast<double>(s.dim);
  Values result;
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t t = 0; t < s.frames; ++t)
      for (int64_t n = 0; n < s.tokens; ++n) {
        Sum sum, squares;
        for (int64_t c = 0; c < s.dim; ++c) sum.add(with_position(x, position, b, t, n, c, with));
        const Bounded mean = times(sum.total(with), 1 / dim);
        for (int64_t c = 0; c < s.dim; ++c) {
          const Bounded off = with.subtract(with_position(x, position, b, t, n, c, with), mean);
          squares.add(with.multiply(off, off));
        }
        const Bounded variance = times(squares.total(with), 1 / dim);
        const double root = 1 / std::sqrt(variance.value + eps);
        result.push_back(with.round(mean.value, mean.error));
        result.push_back(with.round(root, 0.5 * root * variance.error / (variance.value + eps), 4));
      }
  return result;
}

// x̂ = (x - mean)·scale of a row's element, by statistics [rows, 2].
template <class X>
Bounded standard(const X& x, const Input* position, const Values& statistics, int64_t b, int64_t t, int64_t n,
                 int64_t c, const Arithmetic& with) {
  const size_t row = static_cast<size_t>((b * x.sizes.frames + t) * x.sizes.tokens + n);
  const Bounded off = with.subtract(with_position(x, position, b, t, n, c, with), statistics[2 * row]);
  return with.multiply(off, statistics[2 * row + 1]);
}

// The LayerNorm's output [rows, dim].
template <class X>
Values normalized(const X& x, const Input* position, const Values& statistics, const Input& weight, const Input& bias,
                  const Arithmetic& with) {
  const TokenSizes& s = x.sizes;
  Values result;
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t t = 0; t < s.frames; ++t)
      for (int64_t n = 0; n < s.tokens; ++n)
        for (int64_t c = 0; c < s.dim; ++c)
          result.push_back(
              with.add(with.multiply(standard(x, position, statistics, b, t, n, c, with), with.exact(weight[c])),
                       with.exact(bias[c])));
  return result;
}

struct NormGradients {
  Values x, weight, bias, position;
};

// grad_x = scale·(g - mean(g) - x̂·mean(g·x̂)) with g = grad_normalized·weight.
template <class X>
NormGradients norm_backward(const X& x, const Input* position, const Values& statistics, const Input& weight,
                            const Input& grad_normalized, const Arithmetic& with) {
  const TokenSizes& s = x.sizes;
  const double dim = static_cast<double>(s.dim);
  std::vector<Sum> of_weight(static_cast<size_t>(s.dim)), of_bias = of_weight,
                                                          of_position(static_cast<size_t>(s.frames * s.dim));
  NormGradients gradients;
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t t = 0; t < s.frames; ++t)
      for (int64_t n = 0; n < s.tokens; ++n) {
        const int64_t row = (b * s.frames + t) * s.tokens + n;
        const auto grad = [&](int64_t c) { return with.exact(grad_normalized[row * s.dim + c]); };
        Sum plain, along;
        for (int64_t c = 0; c < s.dim; ++c) {
          const Bounded hat = standard(x, position, statistics, b, t, n, c, with);
          const Bounded g = with.multiply(grad(c), with.exact(weight[c]));
          plain.add(g);
          along.add(with.multiply(g, hat));
          of_weight[static_cast<size_t>(c)].add(with.multiply(grad(c), hat));
          of_bias[static_cast<size_t>(c)].add(grad(c));
        }
        const Bounded mean = times(plain.total(with), 1 / dim), mean_along = times(along.total(with), 1 / dim);
        for (int64_t c = 0; c < s.dim; ++c) {
          const Bounded hat = standard(x, position, statistics, b, t, n, c, with);
          const Bounded g = with.multiply(grad(c), with.exact(weight[c]));
          const Bounded inner = with.subtract(with.subtract(g, mean), with.multiply(hat, mean_along));
          const Bounded of_x = with.multiply(statistics[static_cast<size_t>(2 * row + 1)], inner);
          gradients.x.push_back(of_x);
          of_position[static_cast<size_t>(t * s.dim + c)].add(of_x);
        }
      }
  for (const Sum& sum : of_weight) gradients.weight.push_back(sum.total(with));
  for (const Sum& sum : of_bias) gradients.bias.push_back(sum.total(with));
  for (const Sum& sum : of_position) gradients.position.push_back(sum.total(with));
  return gradients;
}

// Σ_k rows[row, k]·weight[column, offset + k], added to `sum`; weight's rows are `pitch` long.
inline void add_product(Sum& sum, const Values& rows, int64_t row, int64_t depth, const Input& weight, int64_t column,
                        int64_t pitch, int64_t offset) {
  for (int64_t k = 0; k < depth; ++k)
    sum.add(times(rows[static_cast<size_t>(row * depth + k)], weight[column * pitch + offset + k]));
}

// --- The global level of the class tokens --------------------------------------------------------------------------

// A channel of a clip: its frames before and behind each convolution in time, and the mean of the last one's.
struct GlobalLevel {
  std::vector<Values> x, y;
  Bounded mean;
};

// Of two neighbours; which of them it is may be open.
inline Bounded larger(Bounded a, Bounded b) { return {std::max(a.value, b.value), std::max(a.error, b.error)}; }

// Calls f(tap, frame of x, frame of y) for each pair that a tap of a convolution in time joins.
template <class F>
void for_each_tap(size_t frames, F f) {
  for (size_t t = 0; t < frames; ++t)
    for (size_t tap = 0; tap < 3; ++tap)
      if (t + tap >= 1 && t + tap <= frames) f(static_cast<int64_t>(tap), t + tap - 1, t);
}

// x: the channel's frames; convolutions: weight [dim, 3] and bias [dim] of each. Between two of them are max pooling
// over two frames, whose last is alone where their number is odd, and GELU.
inline GlobalLevel global_level(Values x, const std::vector<Input>& convolutions, int64_t channel,
                                const Arithmetic& with) {
  GlobalLevel level;
  for (size_t k = 0; k < convolutions.size(); k += 2) {
    if (k) {
      const Values& y = level.y.back();
      x.clear();
      for (size_t t = 0; t < y.size(); t += 2) x.push_back(with.gelu(t + 1 < y.size() ? larger(y[t], y[t + 1]) : y[t]));
    }
    std::vector<Sum> sums(x.size());
    for_each_tap(x.size(), [&](int64_t tap, size_t from, size_t to) {
      sums[to].add(times(x[from], convolutions[k][3 * channel + tap]));
    });
    Values y;
    for (Sum& sum : sums) {
      sum.add_product(1, convolutions[k + 1][channel]);
      y.push_back(sum.total(with));
    }
    level.x.push_back(x);
    level.y.push_back(y);
  }
  Sum sum;
  for (const Bounded& frame : level.y.back()) sum.add(frame);
  const double frames = static_cast<double>(sum.terms);
  level.mean = with.round(sum.value / frames, sum.total(with).error / frames);
  return level;
}

// The gradient of the channel's frames; those of the convolutions are added to `of`.
inline Values global_level_backward(const GlobalLevel& level, Bounded of_mean, const std::vector<Input>& convolutions,
                                    int64_t channel, std::vector<std::vector<Sum>>& of, const Arithmetic& with) {
  const double frames = static_cast<double>(level.y.back().size());
  Values grad(level.y.back().size(), with.round(of_mean.value / frames, of_mean.error / frames));
  for (size_t k = level.x.size(); k-- > 0;) {
    const Values& x = level.x[k];
    std::vector<Sum> of_x(x.size());
    for_each_tap(x.size(), [&](int64_t tap, size_t from, size_t to) {
      const int64_t parameter = 3 * channel + tap;
      of_x[from].add(times(grad[to], convolutions[2 * k][parameter]));
      of[2 * k][static_cast<size_t>(parameter)].add(with.multiply(x[from], grad[to]));
    });
    for (const Bounded& g : grad) of[2 * k + 1][static_cast<size_t>(channel)].add(g);
    if (k == 0) {
      grad.clear();
      for (const Sum& sum : of_x) grad.push_back(sum.total(with));
      break;
    }
    const Values& y = level.y[k - 1];
    grad.assign(y.size(), Bounded{});
    for (size_t t = 0; t < x.size(); ++t) {
      const size_t first = 2 * t, second = std::min(first + 1, y.size() - 1);
      const Bounded g = with.multiply(of_x[t].total(with), with.gelu_slope(larger(y[first], y[second])));
      const double apart = y[second].value - y[first].value;
      if (second > first && std::fabs(apart) <= y[first].error + y[second].error)  // either may be the larger
        grad[first].error = grad[second].error = std::fabs(g.value) + g.error;
      grad[apart > 0 ? second : first] = {g.value, std::max(g.error, grad[first].error)};
    }
  }
  return grad;
}

}  // namespace standalone::reference
