// token_features: forward, and the three entry points of the backward, round products that are done here.
#include "inti/cuda/token_features.h"

#include <optional>

#include "left_over.h"
#include "reference.h"
#include "report.h"

namespace standalone {
namespace {

struct Case {
  const char* name;
  TokenSizes sizes;
  int64_t width;
  Layout x = Layout::contiguous;
  bool position = true, accumulate = false, keep = true;
  bool wants_x = true, wants_norm = true, wants_position = true, wants_bias = true;
  double offset = 0;      // of x
  int64_t gap = 0;        // behind each row of grad_features
  bool deferred = false;  // the sums are left to partial_sums
  bool total = false;     // what grad_x comes to is added to a wide one, for 16 bits
};

std::vector<Case> cases(int64_t real_clips) {
  if (real_clips) return {{"real", {real_clips, 16, 197, 768}, 384}};
  Case bare{"no position, nothing kept", {1, 2, 16, 32}, 16};
  bare.position = bare.wants_position = bare.keep = false;
  Case added{"accumulate", {1, 4, 9, 24}, 8, Layout::padded};
  added.accumulate = true;
  Case far{"far from 0", {1, 2, 17, 72}, 40};
  far.offset = 24;
  Case of_x{"grad_x only", {1, 2, 9, 16}, 8}, of_norm{"grad_norm_weight, grad_norm_bias only", {1, 2, 9, 16}, 8},
      of_position{"grad_position only", {1, 2, 9, 16}, 8};
  of_x.wants_norm = of_x.wants_position = of_x.wants_bias = false;
  of_norm.wants_x = of_norm.wants_position = of_norm.wants_bias = false;
  of_position.wants_x = of_position.wants_norm = of_position.wants_bias = false;
  Case columns{"grad_features are columns", {2, 2, 19, 40}, 24}, odd_columns = columns;
  columns.gap = 16;
  odd_columns.gap = 3;
  Case deferred{"sums left over", {2, 4, 19, 40}, 24};
  deferred.deferred = true;
  Case total{"into a total", {2, 4, 19, 40}, 24},
      total_alone{"into a total, odd rows", {1, 2, 17, 43}, 21, Layout::odd};
  total.total = total.accumulate = total_alone.total = true;
  return {
      {"several tiles, ragged", {2, 4, 19, 88}, 136},
      {"many clips, full tiles", {24, 4, 37, 24}, 24},
      {"several steps of channels", {1, 2, 35, 536}, 24},
      {"frames first", {3, 2, 7, 64}, 64, Layout::swapped},
      {"odd rows", {1, 2, 33, 43}, 37, Layout::odd},
      {"shifted", {1, 2, 33, 40}, 48, Layout::shifted},
      {"one number", {1, 2, 1, 1}, 1},
      bare,
      added,
      far,
      of_x,
      of_norm,
      of_position,
      columns,
      odd_columns,
      deferred,
      total,
      total_alone,
  };
}

struct Setting {
  const Case& c;
  Random random{0xfea7};
  DType dtype, wide;
  Arithmetic with;
  int64_t rows;
  Tokens x;
  std::optional<Input> position;
  Input norm_weight, norm_bias, weight, bias;
  Array statistics, preactivation;
  static constexpr double kEps = 1e-5;

  Setting(const Case& c, DType dtype)
      : c(c),
        dtype(dtype),
        wide(wide_of(dtype)),
        with(wide),
        rows(c.sizes.batch * c.sizes.frames * c.sizes.tokens),
        x(c.sizes, c.x, dtype, random, 1, c.offset),
        norm_weight(c.sizes.dim, dtype, random, 0.5, 1),
        norm_bias(c.sizes.dim, dtype, random),
        weight(c.width * c.sizes.dim, dtype, random, 1.7 / std::sqrt(static_cast<double>(c.sizes.dim))),
        bias(c.width, dtype, random),
        statistics(2 * rows, wide),
        preactivation(rows * c.width, dtype) {
    if (c.position) position.emplace(c.sizes.frames * c.sizes.dim, wide, random);
  }
  const Input* position_or_null() const { return position ? &*position : nullptr; }
  inti::cuda::TokenFeaturesShape shape() const {
    return {c.sizes.batch, c.sizes.frames, c.sizes.tokens, c.sizes.dim, c.width, dtype};
  }
  // The parameters that forward and backward have in common.
  template <class Parameters>
  Parameters parameters() const {
    Parameters p{};
    p.shape = shape();
    p.x = x.data();
    p.x_strides = x.strides;
    p.position = position ? position->data() : nullptr;
    p.norm_weight = norm_weight.data();
    p.norm_bias = norm_bias.data();
    p.statistics = statistics.data();
    p.stream = stream();
    return p;
  }
};

// Where row (clip, frame, token)'s features start, 2·width a pair of frames.
int64_t features_of(const TokenSizes& s, int64_t row, int64_t width) {
  const int64_t frame = row / s.tokens, token = row % s.tokens;  // frame: over all clips
  return ((frame / 2 * s.tokens + token) * 2 + frame % 2) * width;
}

void forward(Report& report, const Setting& s) {
  const int64_t width = s.c.width, dim = s.c.sizes.dim;
  const Array features(s.rows * width, s.dtype);
  auto p = s.parameters<inti::cuda::TokenFeaturesForward>();
  p.weight = s.weight.data();
  p.bias = s.bias.data();
  p.eps = Setting::kEps;
  p.features = features.data();
  p.preactivation = s.c.keep ? s.preactivation.data() : nullptr;
  const auto launch = [&] { inti::cuda::token_features_forward(p); };
  launch();
  synchronize();

  const auto statistics = reference::statistics(s.x, s.position_or_null(), Setting::kEps, s.with);
  report.check("statistics", s.statistics, statistics);
  // The tensor cores take the LayerNorm's output in x's dtype.
  const auto normalized = reference::stored(
      reference::normalized(s.x, s.position_or_null(), statistics, s.norm_weight, s.norm_bias, s.with), s.dtype);
  reference::Values before, after(static_cast<size_t>(features.size()));
  for (int64_t row = 0; row < s.rows; ++row)
    for (int64_t n = 0; n < width; ++n) {
      Sum sum;
      reference::add_product(sum, normalized, row, dim, s.weight, n, dim, 0);
      sum.add_product(1, s.bias[n]);
      before.push_back(sum.total(s.with));
      after[static_cast<size_t>(features_of(s.c.sizes, row, width) + n)] = s.with.gelu(before.back());
    }
  report.check("features", features, reference::stored(after, s.dtype));
  if (s.c.keep) report.check("preactivation", s.preactivation, reference::stored(before, s.dtype));
  const int64_t kept = s.c.keep ? s.preactivation.bytes() : 0;
  report.time("forward", s.x.bytes() + s.weight.bytes() + features.bytes() + kept, launch);
}

// The features once more, from the preactivation as the forward left it.
void activation(Report& report, const Setting& s) {
  const int64_t width = s.c.width;
  const Array features(s.rows * width, s.dtype);
  inti::cuda::TokenFeaturesActivation p{};
  p.shape = s.shape();
  p.preactivation = s.preactivation.data();
  p.features = features.data();
  p.stream = stream();
  const auto launch = [&] { inti::cuda::token_features_activation(p); };
  launch();
  synchronize();
  const auto preactivation = s.preactivation.values("preactivation");
  reference::Values expected(preactivation.size());
  for (int64_t row = 0; row < s.rows; ++row)
    for (int64_t n = 0; n < width; ++n)
      expected[static_cast<size_t>(features_of(s.c.sizes, row, width) + n)] =
          s.with.gelu({preactivation[static_cast<size_t>(row * width + n)], 0});
  report.check("activation", features, reference::stored(expected, s.dtype));
  report.time("activation", s.preactivation.bytes() + features.bytes(), launch);
}

// grad_preactivation and the Linear's bias, from the preactivation as the forward left it.
std::vector<double> backward_activation(Report& report, Setting& s) {
  const int64_t width = s.c.width;
  const int64_t pitch = 2 * width + s.c.gap;
  const Input grad_features(s.rows / 2 * pitch, s.dtype, s.random);
  const Array grad_preactivation(s.rows * width, s.dtype), grad_bias(width, s.dtype),
      partials(inti::cuda::token_features_tiles(s.shape()) * width, s.wide);
  inti::cuda::TokenFeaturesBackwardActivation p{};
  p.shape = s.shape();
  p.grad_features = grad_features.data();
  p.grad_features_pitch = pitch;
  p.preactivation = s.preactivation.data();
  p.grad_preactivation = grad_preactivation.data();
  p.grad_bias = s.c.wants_bias ? grad_bias.data() : nullptr;
  p.partials = s.c.wants_bias ? partials.data() : nullptr;
  p.stream = stream();
  const auto launch = [&] {
    if (!s.c.deferred) return inti::cuda::token_features_backward_activation(p);
    auto q = p;
    q.grad_bias = nullptr;
    inti::cuda::token_features_backward_activation(q);
    LeftOver sums(s.wide);
    sums.add(partials, width, grad_bias);
    sums.launch();
  };
  launch();
  synchronize();

  const auto preactivation = s.preactivation.values("preactivation");
  reference::Values grads;
  std::vector<Sum> sums(static_cast<size_t>(width));
  for (int64_t row = 0; row < s.rows; ++row)
    for (int64_t n = 0; n < width; ++n) {
      const Bounded slope = s.with.gelu_slope({preactivation[static_cast<size_t>(row * width + n)], 0});
      const int64_t place = features_of(s.c.sizes, row, width) + n;
      const double grad = grad_features[place / (2 * width) * pitch + place % (2 * width)];
      grads.push_back(s.with.multiply(slope, s.with.exact(grad)));
      sums[static_cast<size_t>(n)].add(grads.back());
    }
  reference::Values of_bias;
  for (const Sum& sum : sums) of_bias.push_back(sum.total(s.with));
  report.check("grad_preactivation", grad_preactivation, reference::stored(grads, s.dtype));
  if (p.grad_bias) report.check("grad_bias", grad_bias, reference::stored(of_bias, s.dtype));
  partials.values("partials");
  report.time("backward activation",
              grad_features.bytes() + s.preactivation.bytes() + grad_preactivation.bytes() + grad_bias.bytes(), launch);
  return grad_preactivation.values("grad_preactivation");
}

void normalize(Report& report, const Setting& s) {
  const Array normalized(s.x.sizes.size(), s.dtype);
  auto p = s.parameters<inti::cuda::TokenFeaturesNormalize>();
  p.normalized = normalized.data();
  const auto launch = [&] { inti::cuda::token_features_normalize(p); };
  launch();
  synchronize();
  const auto statistics = reference::exactly(s.statistics.values("statistics"));
  const auto expected =
      reference::normalized(s.x, s.position_or_null(), statistics, s.norm_weight, s.norm_bias, s.with);
  report.check("normalized", normalized, reference::stored(expected, s.dtype));
  report.time("normalize", s.x.bytes() + s.statistics.bytes() + normalized.bytes(), launch);
}

// The caller's product: grad_normalized = grad_preactivation · weight.
std::vector<double> through_linear(const Setting& s, const std::vector<double>& grad_preactivation) {
  const int64_t width = s.c.width, dim = s.c.sizes.dim;
  std::vector<double> product(static_cast<size_t>(s.rows * dim));
  for (int64_t row = 0; row < s.rows; ++row)
    for (int64_t n = 0; n < width; ++n)
      for (int64_t k = 0; k < dim; ++k)
        product[static_cast<size_t>(row * dim + k)] +=
            grad_preactivation[static_cast<size_t>(row * width + n)] * s.weight[n * dim + k];
  for (double& value : product) value = rounded(value, s.dtype);
  return product;
}

void backward_norm(Report& report, Setting& s, const Input& grad_normalized) {
  const Case& c = s.c;
  const Input before(s.x.sizes.size(), s.dtype, s.random);  // what grad_x is added to
  const Array fresh(s.x.sizes.size(), s.dtype), grad_norm_weight(c.sizes.dim, s.dtype),
      grad_norm_bias(c.sizes.dim, s.dtype), grad_position(c.sizes.frames * c.sizes.dim, s.wide),
      norm_partials(inti::cuda::token_features_tiles(s.shape()) * 2 * c.sizes.dim, s.wide),
      position_partials(inti::cuda::token_features_tiles(s.shape()) * c.sizes.dim, s.wide);
  const Input beside(s.x.sizes.size(), s.wide, s.random);  // what both are added to
  const bool total = c.total && s.dtype != s.wide;
  const Array& grad_x = total ? beside.array : c.accumulate ? before.array : fresh;
  auto p = s.parameters<inti::cuda::TokenFeaturesBackwardNorm>();
  p.grad_normalized = grad_normalized.data();
  p.grad_x = c.wants_x ? grad_x.data() : nullptr;
  if (total) p.grad_x = c.accumulate ? before.data() : nullptr;
  p.total = total ? beside.data() : nullptr;
  p.accumulate = c.accumulate;
  p.grad_norm_weight = c.wants_norm ? grad_norm_weight.data() : nullptr;
  p.grad_norm_bias = c.wants_norm ? grad_norm_bias.data() : nullptr;
  p.grad_position = c.wants_position ? grad_position.data() : nullptr;
  p.norm_partials = c.wants_norm ? norm_partials.data() : nullptr;
  p.position_partials = c.wants_position ? position_partials.data() : nullptr;
  const auto launch = [&] {
    if (!c.deferred) return inti::cuda::token_features_backward_norm(p);
    auto q = p;
    q.grad_norm_weight = q.grad_norm_bias = q.grad_position = nullptr;
    inti::cuda::token_features_backward_norm(q);
    const int64_t dim = c.sizes.dim;
    LeftOver sums(s.wide);
    sums.add(norm_partials, 0, 2 * dim, dim, dim, dim, grad_norm_weight);
    sums.add(norm_partials, dim, 2 * dim, dim, dim, dim, grad_norm_bias);
    sums.add(position_partials, c.sizes.frames * dim, grad_position);
    sums.launch();
  };
  launch();
  synchronize();

  const auto statistics = reference::exactly(s.statistics.values("statistics"));
  auto expected =
      reference::norm_backward(s.x, s.position_or_null(), statistics, s.norm_weight, grad_normalized, s.with);
  if (c.accumulate) reference::add_to(expected.x, before.values, total ? s.wide : s.dtype, s.with);
  if (total) {
    reference::add_to(expected.x, beside.values, s.wide, s.with);
    if (c.accumulate) before.array.check_unchanged("grad_x");
  }
  if (p.grad_x || total) report.check("grad_x", grad_x, reference::stored(expected.x, grad_x.dtype()));
  if (p.grad_norm_weight) {
    report.check("grad_norm_weight", grad_norm_weight, reference::stored(expected.weight, s.dtype));
    report.check("grad_norm_bias", grad_norm_bias, reference::stored(expected.bias, s.dtype));
  }
  if (p.grad_position) report.check("grad_position", grad_position, expected.position);
  norm_partials.values("norm_partials");
  position_partials.values("position_partials");
  report.time("backward norm", s.x.bytes() + s.statistics.bytes() + grad_normalized.bytes() + grad_x.bytes(), launch);
}

}  // namespace

void check_token_features(Report& report, int64_t real_clips) {
  for (const Case& c : cases(real_clips)) {
    report.run(c.name, [&] {
      Setting s(c, report.dtype());
      forward(report, s);
      if (!c.keep) return;
      activation(report, s);
      const Input grad_normalized(through_linear(s, backward_activation(report, s)), s.dtype);
      normalize(report, s);
      backward_norm(report, s, grad_normalized);
      s.x.array.check_unchanged("x");
      s.weight.array.check_unchanged("weight");
    });
  }
}

}  // namespace standalone
