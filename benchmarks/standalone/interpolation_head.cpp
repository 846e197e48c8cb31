// interpolation_head: forward, and the part of the backward that is the kernels'.
#include "inti/cuda/interpolation_head.h"

#include <optional>

#include "inti/cuda/pair_interpolate.h"  // pair_interpolate_tiles
#include "left_over.h"
#include "reference.h"
#include "report.h"

namespace standalone {
namespace {

struct Case {
  const char* name;
  TokenSizes sizes;  // of x
  int64_t width, context, hidden;
  Layout x = Layout::contiguous, grad_z = Layout::contiguous;
  bool cube = true, frame_bias = true, position = true, accumulate = false, keep = true;
  bool wants_x = true, wants_position = true, wants_network = true, wants_sums = true;
  bool float32_x = false;
  bool deferred = false;  // the sums are left to partial_sums
};

std::vector<Case> cases(int64_t real_clips) {
  if (real_clips) return {{"real", {real_clips, 16, 197, 768}, 768, 768, 768}};
  Case alone{"features alone, no position", {1, 4, 17, 16}, 48, 0, 72};
  alone.cube = alone.frame_bias = alone.position = alone.wants_position = false;
  Case no_cube{"frame context without cube", {2, 4, 9, 24}, 40, 24, 64};
  no_cube.cube = false;
  Case no_frame{"cube without frame context", {2, 2, 23, 32}, 32, 32, 136};
  no_frame.frame_bias = false;
  Case inference{"nothing kept", {1, 2, 33, 16}, 16, 16, 16};
  inference.keep = false;
  Case added{"accumulate, mixed x", {1, 4, 9, 24}, 24, 24, 24, Layout::padded, Layout::swapped};
  added.accumulate = added.float32_x = true;
  Case of_x{"grad_x only", {1, 2, 9, 16}, 16, 16, 16}, of_network{"network only", {1, 2, 9, 16}, 16, 16, 16},
      of_hidden{"grad_preactivation only", {1, 2, 9, 16}, 16, 16, 16};
  of_x.wants_position = of_x.wants_network = of_x.wants_sums = false;
  of_network.wants_x = of_network.wants_position = false;
  of_hidden.wants_x = of_hidden.wants_position = of_hidden.wants_sums = false;
  Case deferred{"sums left over", {2, 4, 19, 24}, 24, 24, 40};
  deferred.deferred = true;
  return {
      {"several tiles, ragged", {2, 4, 37, 72}, 88, 40, 200},
      {"many clips, full tiles", {40, 4, 37, 8}, 24, 8, 24},
      {"frames first", {3, 4, 7, 32}, 64, 32, 64, Layout::swapped, Layout::repeated},
      {"odd rows", {1, 2, 35, 19}, 21, 19, 67, Layout::odd, Layout::odd},
      {"shifted", {1, 2, 35, 24}, 24, 24, 40, Layout::shifted, Layout::shifted},
      {"one number", {1, 2, 1, 1}, 1, 1, 1},
      alone,
      no_cube,
      no_frame,
      inference,
      added,
      of_x,
      of_network,
      of_hidden,
      deferred,
  };
}

struct Setting {
  const Case& c;
  Random random{0x4ead};
  DType dtype, x_dtype, wide;
  Arithmetic with;
  int64_t frame_pairs, rows, inputs;
  Tokens x;
  Input features, weight1, bias1, weight2, bias2;
  std::optional<Input> cube, frame_bias, position;
  Array difference, preactivation;

  Setting(const Case& c, DType dtype)
      : c(c),
        dtype(dtype),
        x_dtype(c.float32_x && dtype != DType::float64 ? DType::float32 : dtype),
        wide(wide_of(dtype)),
        with(wide),
        frame_pairs(c.sizes.batch * (c.sizes.frames / 2)),
        rows(frame_pairs * c.sizes.tokens),
        inputs(c.width + c.context),
        x(c.sizes, c.x, x_dtype, random),
        features(rows * c.width, dtype, random),
        weight1(c.hidden * inputs, dtype, random, 2 / std::sqrt(static_cast<double>(inputs))),
        bias1(c.hidden, dtype, random),
        weight2(2 * c.hidden, dtype, random, 3 / std::sqrt(static_cast<double>(c.hidden))),
        bias2(2, dtype, random),
        difference(rows, wide),
        preactivation(rows * c.hidden, dtype) {
    if (c.cube) cube.emplace(rows * c.context, dtype, random);
    if (c.frame_bias) frame_bias.emplace(frame_pairs * c.hidden, wide, random);
    if (c.position) position.emplace(c.sizes.frames * c.sizes.dim, wide, random);
  }
  static void* address(const std::optional<Input>& input) { return input ? input->data() : nullptr; }
  const Input* position_or_null() const { return position ? &*position : nullptr; }
  inti::cuda::InterpolationHeadShape shape() const {
    return {c.sizes.batch, c.sizes.frames, c.sizes.tokens, c.sizes.dim, c.width, c.context, c.hidden, dtype, x_dtype};
  }
  Bounded difference_of_weights(int64_t unit) const {
    return with.subtract(with.exact(weight2[unit]), with.exact(weight2[c.hidden + unit]));
  }
};

// What GELU is taken of [rows, hidden].
reference::Values hidden_layer(const Setting& s) {
  const Case& c = s.c;
  reference::Values before;
  for (int64_t row = 0; row < s.rows; ++row)
    for (int64_t unit = 0; unit < c.hidden; ++unit) {
      Sum sum;
      const int64_t weight = unit * s.inputs;
      for (int64_t k = 0; k < c.width; ++k) sum.add_product(s.features[row * c.width + k], s.weight1[weight + k]);
      for (int64_t k = 0; k < (s.cube ? c.context : 0); ++k)
        sum.add_product((*s.cube)[row * c.context + k], s.weight1[weight + c.width + k]);
      sum.add_product(1, s.bias1[unit]);
      if (s.frame_bias) sum.add_product(1, (*s.frame_bias)[row / c.sizes.tokens * c.hidden + unit]);
      before.push_back(sum.total(s.with));
    }
  return before;
}

std::vector<reference::PairWeights> weights_of(const reference::Values& differences, const Arithmetic& with) {
  std::vector<reference::PairWeights> weights;
  for (const Bounded& difference : differences) weights.push_back(reference::weights_of(difference, with));
  return weights;
}

void forward(Report& report, const Setting& s) {
  const Case& c = s.c;
  const Array z(s.rows * c.sizes.dim, s.x_dtype), weights(2 * s.rows, s.dtype),
      partials(inti::cuda::interpolation_head_partials(s.shape()) * s.rows, s.wide);
  inti::cuda::InterpolationHeadForward p{};
  p.shape = s.shape();
  p.features = s.features.data();
  p.cube = Setting::address(s.cube);
  p.frame_bias = Setting::address(s.frame_bias);
  p.x = s.x.data();
  p.x_strides = s.x.strides;
  p.position = Setting::address(s.position);
  p.weight1 = s.weight1.data();
  p.bias1 = s.bias1.data();
  p.weight2 = s.weight2.data();
  p.bias2 = s.bias2.data();
  p.partials = partials.data();
  p.difference = s.difference.data();
  p.preactivation = c.keep ? s.preactivation.data() : nullptr;
  p.z = z.data();
  p.weights = weights.data();
  p.stream = stream();
  const auto launch = [&] { inti::cuda::interpolation_head_forward(p); };
  launch();
  synchronize();

  const reference::Values before = hidden_layer(s);
  reference::Values differences;
  for (int64_t row = 0; row < s.rows; ++row) {
    Sum sum;
    for (int64_t unit = 0; unit < c.hidden; ++unit)
      sum.add(s.with.multiply(s.with.gelu(before[static_cast<size_t>(row * c.hidden + unit)]),
                              s.difference_of_weights(unit)));
    sum.add(s.with.subtract(s.with.exact(s.bias2[0]), s.with.exact(s.bias2[1])));
    differences.push_back(sum.total(s.with));
  }
  if (c.keep) report.check("preactivation", s.preactivation, reference::stored(before, s.dtype));
  report.check("difference", s.difference, differences);
  const auto both = weights_of(differences, s.with);
  reference::Values of_pairs;
  for (const auto& pair : both) {
    of_pairs.push_back(stored(pair.first, s.dtype));
    of_pairs.push_back(stored(pair.second, s.dtype));
  }
  report.check("weights", weights, of_pairs);
  report.check("z", z, reference::stored(reference::interpolate(s.x, s.position_or_null(), both, s.with), s.x_dtype));
  partials.values("partials");
  report.time("forward",
              s.features.bytes() + (s.cube ? s.cube->bytes() : 0) + s.weight1.bytes() + s.x.bytes() + z.bytes() +
                  weights.bytes() + (c.keep ? s.preactivation.bytes() : 0),
              launch);
}

// The product alone, which is to leave what the forward left.
void preactivation(Report& report, const Setting& s) {
  const Array alone(s.rows * s.c.hidden, s.dtype);
  inti::cuda::InterpolationHeadPreactivation p{};
  p.shape = s.shape();
  p.features = s.features.data();
  p.cube = Setting::address(s.cube);
  p.frame_bias = Setting::address(s.frame_bias);
  p.weight1 = s.weight1.data();
  p.bias1 = s.bias1.data();
  p.preactivation = alone.data();
  p.stream = stream();
  const auto launch = [&] { inti::cuda::interpolation_head_preactivation(p); };
  launch();
  synchronize();
  reference::Values same;
  for (const double value : s.preactivation.values("preactivation")) same.push_back({value, 0});
  report.check("preactivation alone", alone, same);
  report.time("preactivation", s.features.bytes() + (s.cube ? s.cube->bytes() : 0) + s.weight1.bytes() + alone.bytes(),
              launch);
}

// The hidden layer's gradients, from the preactivation and the difference's gradient as the kernels left them.
struct HiddenGradients {
  reference::Values preactivation, frame_bias, bias1, weight2;
};
HiddenGradients hidden_backward(const Setting& s, const std::vector<double>& grad_difference) {
  const int64_t hidden = s.c.hidden;
  const auto before = s.preactivation.values("preactivation");
  HiddenGradients gradients;
  std::vector<Sum> of_frames(static_cast<size_t>(s.frame_pairs * hidden)), of_bias1(static_cast<size_t>(hidden)),
      of_weight2 = of_bias1;
  for (int64_t row = 0; row < s.rows; ++row) {
    const Bounded grad{grad_difference[static_cast<size_t>(row)], 0};
    for (int64_t unit = 0; unit < hidden; ++unit) {
      const Bounded at{before[static_cast<size_t>(row * hidden + unit)], 0};
      const Bounded upstream = s.with.multiply(grad, s.difference_of_weights(unit));
      gradients.preactivation.push_back(s.with.multiply(upstream, s.with.gelu_slope(at)));
      of_frames[static_cast<size_t>(row / s.c.sizes.tokens * hidden + unit)].add(gradients.preactivation.back());
      of_bias1[static_cast<size_t>(unit)].add(gradients.preactivation.back());
      of_weight2[static_cast<size_t>(unit)].add(s.with.multiply(grad, s.with.gelu(at)));
    }
  }
  for (const Sum& sum : of_frames) gradients.frame_bias.push_back(sum.total(s.with));
  for (const Sum& sum : of_bias1) gradients.bias1.push_back(sum.total(s.with));
  for (const double sign : {1.0, -1.0})
    for (const Sum& sum : of_weight2) gradients.weight2.push_back(reference::times(sum.total(s.with), sign));
  return gradients;
}

void backward(Report& report, Setting& s) {
  const Case& c = s.c;
  const TokenSizes& sizes = c.sizes;
  const Tokens grad_z({sizes.batch, sizes.frames / 2, sizes.tokens, sizes.dim}, c.grad_z, s.x_dtype, s.random);
  const Input grad_weights(2 * s.rows, s.dtype, s.random);
  const Input before(sizes.size(), s.x_dtype, s.random);  // what grad_x is added to
  const Array fresh(sizes.size(), s.x_dtype), grad_position(sizes.frames * sizes.dim, s.wide),
      grad_difference(s.rows, s.wide), grad_preactivation(s.rows * c.hidden, s.dtype),
      grad_frame_bias(s.frame_pairs * c.hidden, s.wide), grad_bias1(c.hidden, s.dtype),
      grad_weight2(2 * c.hidden, s.dtype), grad_bias2(2, s.dtype);
  const Array& grad_x = c.accumulate ? before.array : fresh;
  const int64_t tiles = inti::cuda::pair_interpolate_tiles(sizes.batch, sizes.frames, sizes.tokens);
  const Array position_partials(sizes.batch * tiles * sizes.frames * sizes.dim, s.wide),
      frame_partials(inti::cuda::interpolation_head_tiles(s.shape()) * c.hidden, s.wide),
      weight2_partials(frame_partials.size(), s.wide);

  inti::cuda::InterpolationHeadBackward p{};
  p.shape = s.shape();
  p.x = s.x.data();
  p.x_strides = s.x.strides;
  p.position = Setting::address(s.position);
  p.difference = s.difference.data();
  p.grad_z = grad_z.data();
  p.grad_z_strides = grad_z.strides;
  p.grad_weights = grad_weights.data();
  p.preactivation = c.wants_network ? s.preactivation.data() : nullptr;
  p.weight2 = s.weight2.data();
  p.grad_x = c.wants_x ? grad_x.data() : nullptr;
  p.accumulate = c.accumulate;
  p.grad_position = c.wants_position ? grad_position.data() : nullptr;
  p.position_partials = c.wants_position ? position_partials.data() : nullptr;
  p.grad_difference = grad_difference.data();
  p.grad_preactivation = c.wants_network ? grad_preactivation.data() : nullptr;
  p.grad_frame_bias = c.wants_sums ? grad_frame_bias.data() : nullptr;
  p.grad_bias1 = c.wants_sums ? grad_bias1.data() : nullptr;
  p.frame_partials = c.wants_sums ? frame_partials.data() : nullptr;
  p.grad_weight2 = c.wants_sums ? grad_weight2.data() : nullptr;
  p.weight2_partials = c.wants_sums ? weight2_partials.data() : nullptr;
  p.grad_bias2 = c.wants_sums ? grad_bias2.data() : nullptr;
  p.stream = stream();
  const auto launch = [&] {
    if (!c.deferred) return inti::cuda::interpolation_head_backward(p);
    auto q = p;
    q.grad_position = q.grad_frame_bias = q.grad_bias1 = q.grad_weight2 = q.grad_bias2 = nullptr;
    inti::cuda::interpolation_head_backward(q);
    LeftOver sums(s.wide);
    sums.add(position_partials, sizes.frames * sizes.dim, grad_position);
    sums.add(frame_partials, s.frame_pairs * c.hidden, grad_frame_bias);
    sums.add(frame_partials, c.hidden, grad_bias1);
    sums.add_both_signs(weight2_partials, c.hidden, grad_weight2);
    sums.add_both_signs(grad_difference, 1, grad_bias2);
    sums.launch();
  };
  launch();
  synchronize();

  reference::Values differences;
  for (const double difference : s.difference.values("difference")) differences.push_back({difference, 0});
  auto expected = reference::interpolate_backward(s.x, s.position_or_null(), weights_of(differences, s.with), grad_z,
                                                  grad_weights, s.with);
  if (c.accumulate) reference::add_to(expected.x, before.values, s.x_dtype, s.with);
  report.check("grad_difference", grad_difference, expected.difference);
  if (p.grad_x) report.check("grad_x", grad_x, reference::stored(expected.x, s.x_dtype));
  if (p.grad_position) report.check("grad_position", grad_position, expected.position);
  if (c.wants_network) {
    const HiddenGradients hidden = hidden_backward(s, grad_difference.values("grad_difference"));
    report.check("grad_preactivation", grad_preactivation, reference::stored(hidden.preactivation, s.dtype));
    if (c.wants_sums) {
      report.check("grad_frame_bias", grad_frame_bias, hidden.frame_bias);
      report.check("grad_bias1", grad_bias1, reference::stored(hidden.bias1, s.dtype));
      report.check("grad_weight2", grad_weight2, reference::stored(hidden.weight2, s.dtype));
    }
  }
  if (p.grad_bias2) {
    Sum sum;
    for (const double grad : grad_difference.values("grad_difference")) sum.add_product(1, grad);
    const Bounded total = sum.total(s.with);
    report.check("grad_bias2", grad_bias2, reference::stored({total, {-total.value, total.error}}, s.dtype));
  }
  position_partials.values("position_partials");
  frame_partials.values("frame_partials");
  weight2_partials.values("weight2_partials");
  s.preactivation.values("preactivation");
  report.time("backward",
              s.x.bytes() + grad_z.bytes() + s.preactivation.bytes() + grad_x.bytes() + grad_preactivation.bytes(),
              launch);
}

}  // namespace

void check_interpolation_head(Report& report, int64_t real_clips) {
  for (const Case& c : cases(real_clips)) {
    report.run(c.name, [&] {
      Setting s(c, report.dtype());
      forward(report, s);
      if (c.keep) {
        preactivation(report, s);
        backward(report, s);
      }
      s.x.array.check_unchanged("x");
      s.features.array.check_unchanged("features");
      s.weight1.array.check_unchanged("weight1");
    });
  }
}

}  // namespace standalone
