// class_levels: each entry point by itself, of random numbers: between them are products of the caller's.
#include "inti/cuda/class_levels.h"

#include <optional>

#include "reference.h"
#include "report.h"

namespace standalone {
namespace {

struct Case {
  const char* name;
  TokenSizes sizes;  // of the class tokens, one a frame
  int64_t half;
  Layout x = Layout::contiguous;
  std::optional<DType> x_dtype{};  // as the parameters' unless said; float64 has no other
  bool position = true, frame_level = true, global_level = true;
  double offset = 0;  // of x
};

std::vector<Case> cases(int64_t real_clips) {
  if (real_clips) return {{"real", {real_clips, 16, 1, 768}, 384}};
  Case bare{"no position", {2, 6, 1, 40}, 24, Layout::padded}, far{"far from 0", {1, 4, 1, 72}, 40};
  bare.position = false;
  far.offset = 200;
  Case of_frames{"frame level only", {3, 4, 1, 43}, 21, Layout::odd}, of_clips{"global level only", {3, 8, 1, 43}, 0};
  of_frames.global_level = of_clips.frame_level = false;
  Case plain{"frame level only, no position", {2, 2, 1, 32}, 16};
  plain.global_level = plain.position = false;
  return {
      {"several clips, odd rows", {3, 8, 1, 43}, 37, Layout::odd},
      {"frames first", {3, 4, 1, 64}, 32, Layout::swapped},
      {"x in float32", {2, 4, 1, 43}, 21, Layout::odd, DType::float32},
      {"x in float16", {2, 4, 1, 40}, 20, Layout::shifted, DType::float16},
      {"x in bfloat16", {2, 4, 1, 40}, 20, Layout::padded, DType::bfloat16},
      {"2 frames", {2, 2, 1, 35}, 18},
      {"6 frames", {2, 6, 1, 35}, 18},
      {"14 frames", {2, 14, 1, 35}, 18},
      {"many clips, few channels", {150, 2, 1, 5}, 3},
      {"one number", {1, 2, 1, 1}, 1},
      bare,
      far,
      of_frames,
      plain,
      of_clips,
  };
}

// The frame level's two LayerNorms, in the order of ClassLevelsBackwardSums.
enum Rows { kFrames, kPairs };
const char* const kRows[] = {"frames", "pairs"};

struct Norm {
  Input weight, bias;
};

struct Setting {
  const Case& c;
  Random random{0xc1a5};
  DType dtype, wide;
  Arithmetic with;
  int64_t frames, pairs;  // of all clips
  Tokens x;
  std::optional<Input> position;
  Input preactivation, pair_preactivation;
  std::vector<Norm> norms;          // two, or none
  std::vector<Input> convolutions;  // as kGlobalParameters says, or none
  // Not small beside a variance, so that it would be missed.
  static constexpr double kEps = 0.125;

  Setting(const Case& c, DType dtype)
      : c(c),
        dtype(dtype),
        wide(wide_of(dtype)),
        with(wide),
        frames(c.sizes.batch * c.sizes.frames),
        pairs(frames / 2),
        x(c.sizes, c.x, wide == DType::float64 ? dtype : c.x_dtype.value_or(dtype), random, 1, c.offset),
        preactivation(frames * c.half, dtype, random, 2),
        pair_preactivation(pairs * dim(), dtype, random, 2) {
    if (c.position) position.emplace(c.sizes.frames * dim(), wide, random);
    for (const Rows rows : {kFrames, kPairs})
      if (c.frame_level) norms.push_back({{columns(rows), dtype, random, 0.5, 1}, {columns(rows), dtype, random}});
    for (int i = 0; i < inti::cuda::kGlobalParameters; ++i)
      if (c.global_level) convolutions.emplace_back((i % 2 ? 1 : 3) * dim(), dtype, random);
  }
  int64_t dim() const { return c.sizes.dim; }
  int64_t count(Rows rows) const { return rows == kFrames ? frames : pairs; }
  int64_t columns(Rows rows) const { return rows == kFrames ? dim() : 2 * c.half; }
  int64_t bytes(Rows rows) const { return rows == kFrames ? x.bytes() : preactivation.bytes(); }
  const Input* position_or_null() const { return position ? &*position : nullptr; }

  // The parameters that all entry points have in common, and those of both directions.
  template <class Parameters>
  Parameters parameters() const {
    Parameters p{};
    p.shape = {c.sizes.batch, c.sizes.frames, dim(), c.half, x.array.dtype(), dtype};
    p.x = x.data();
    p.x_strides = x.strides;
    p.position = position ? position->data() : nullptr;
    p.stream = stream();
    return p;
  }
  template <class Parameters>
  Parameters of_norm(Rows rows) const {
    auto p = parameters<Parameters>();
    p.preactivation = rows == kPairs ? preactivation.data() : nullptr;
    p.norm_weight = norms[rows].weight.data();
    p.norm_bias = norms[rows].bias.data();
    p.eps = kEps;
    return p;
  }
  template <class Parameters>
  Parameters of_context(const Array& workspace) const {
    auto p = parameters<Parameters>();
    p.pair_preactivation = c.frame_level ? pair_preactivation.data() : nullptr;
    for (size_t i = 0; i < convolutions.size(); ++i) p.convolutions[i] = convolutions[i].data();
    p.workspace = c.global_level ? workspace.data() : nullptr;
    return p;
  }
  Array workspace() const {
    return Array(inti::cuda::class_levels_workspace(parameters<inti::cuda::ClassLevelsContext>().shape), wide);
  }
  int64_t context_bytes() const {
    int64_t bytes = c.frame_level ? pair_preactivation.bytes() : 0;
    if (c.global_level) bytes += x.bytes();
    for (const Input& parameter : convolutions) bytes += parameter.bytes();
    return bytes;
  }

  // Calls f(rows, position) with what a LayerNorm is of.
  template <class F>
  void with_rows(Rows rows, F f) const {
    if (rows == kFrames) return f(x, position_or_null());
    reference::Computed halves{{c.sizes.batch, c.sizes.frames / 2, 1, columns(kPairs)}, {}};
    for (const double value : preactivation.values) halves.values.push_back(with.gelu({value, 0}));
    f(halves, nullptr);
  }
  reference::GlobalLevel global_level(int64_t clip, int64_t channel) const {
    reference::Values frames;
    for (int64_t t = 0; t < c.sizes.frames; ++t)
      frames.push_back(reference::with_position(x, position_or_null(), clip, t, 0, channel, with));
    return reference::global_level(frames, convolutions, channel, with);
  }
};

void normalize(Report& report, const Setting& s, Rows rows) {
  const Array normalized(s.count(rows) * s.columns(rows), s.dtype);
  auto p = s.of_norm<inti::cuda::ClassLevelsNormalize>(rows);
  p.normalized = normalized.data();
  const auto launch = [&] { inti::cuda::class_levels_normalize(p); };
  launch();
  synchronize();
  s.with_rows(rows, [&](const auto& in, const Input* position) {
    const auto statistics = reference::statistics(in, position, Setting::kEps, s.with);
    const auto expected =
        reference::normalized(in, position, statistics, s.norms[rows].weight, s.norms[rows].bias, s.with);
    report.check((std::string("normalized ") + kRows[rows]).c_str(), normalized, reference::stored(expected, s.dtype));
  });
  report.time((std::string("normalize ") + kRows[rows]).c_str(), s.bytes(rows) + normalized.bytes(), launch);
}

void context(Report& report, const Setting& s) {
  const Array workspace = s.workspace(), context(s.pairs * s.dim(), s.wide);
  auto p = s.of_context<inti::cuda::ClassLevelsContext>(workspace);
  p.context = context.data();
  const auto launch = [&] { inti::cuda::class_levels_context(p); };
  launch();
  synchronize();
  const int64_t pairs = s.c.sizes.frames / 2;
  reference::Values expected(static_cast<size_t>(context.size()));
  for (int64_t b = 0; b < s.c.sizes.batch; ++b)
    for (int64_t c = 0; c < s.dim(); ++c) {
      Bounded level;
      if (s.c.global_level) level = s.with.gelu(s.global_level(b, c).mean);
      for (int64_t j = 0; j < pairs; ++j) {
        const int64_t at = (b * pairs + j) * s.dim() + c;
        expected[static_cast<size_t>(at)] =
            s.c.frame_level ? s.with.add(s.with.gelu({s.pair_preactivation[at], 0}), level) : level;
      }
    }
  report.check("context", context, expected);
  workspace.values("workspace");
  report.time("context", s.context_bytes() + context.bytes(), launch);
}

void backward_context(Report& report, Setting& s) {
  const Input grad_context(s.pairs * s.dim(), s.wide, s.random);
  const Array workspace = s.workspace(), grad_pair_preactivation(s.pairs * s.dim(), s.dtype),
              grad_pair_bias(s.dim(), s.dtype), grad_x(s.frames * s.dim(), s.wide);
  std::vector<Array> grad_convolutions;
  auto p = s.of_context<inti::cuda::ClassLevelsBackwardContext>(workspace);
  p.grad_context = grad_context.data();
  p.grad_pair_preactivation = s.c.frame_level ? grad_pair_preactivation.data() : nullptr;
  p.grad_pair_bias = s.c.frame_level ? grad_pair_bias.data() : nullptr;
  p.grad_x = s.c.global_level ? grad_x.data() : nullptr;
  std::vector<std::vector<Sum>> of_convolutions;
  for (size_t i = 0; i < s.convolutions.size(); ++i) {
    const int64_t size = s.convolutions[i].array.size();
    p.grad_convolutions[i] = grad_convolutions.emplace_back(size, s.dtype).data();
    of_convolutions.emplace_back(static_cast<size_t>(size));
  }
  const auto launch = [&] { inti::cuda::class_levels_backward_context(p); };
  launch();
  synchronize();

  const int64_t pairs = s.c.sizes.frames / 2;
  reference::Values of_pairs(static_cast<size_t>(s.pairs * s.dim())), of_x(static_cast<size_t>(s.frames * s.dim()));
  std::vector<Sum> of_bias(static_cast<size_t>(s.dim()));
  for (int64_t b = 0; b < s.c.sizes.batch; ++b)
    for (int64_t c = 0; c < s.dim(); ++c) {
      Sum upstream;
      for (int64_t j = 0; j < pairs; ++j) {
        const int64_t at = (b * pairs + j) * s.dim() + c;
        const Bounded grad = s.with.exact(grad_context[at]);
        upstream.add(grad);
        const Bounded of_pair = s.with.multiply(grad, s.with.gelu_slope({s.pair_preactivation[at], 0}));
        of_pairs[static_cast<size_t>(at)] = of_pair;
        of_bias[static_cast<size_t>(c)].add(of_pair);
      }
      if (!s.c.global_level) continue;
      const auto level = s.global_level(b, c);
      const Bounded of_mean = s.with.multiply(upstream.total(s.with), s.with.gelu_slope(level.mean));
      const auto of_clip = reference::global_level_backward(level, of_mean, s.convolutions, c, of_convolutions, s.with);
      for (int64_t t = 0; t < s.c.sizes.frames; ++t)
        of_x[static_cast<size_t>(s.c.sizes.at(b, t, 0, c))] = of_clip[static_cast<size_t>(t)];
    }
  const auto totals = [&](const std::vector<Sum>& sums) {
    reference::Values values;
    for (const Sum& sum : sums) values.push_back(sum.terms ? sum.total(s.with) : Bounded{});
    return reference::stored(values, s.dtype, true);
  };
  if (s.c.frame_level) {
    report.check("grad_pair_preactivation", grad_pair_preactivation, reference::stored(of_pairs, s.dtype));
    report.check("grad_pair_bias", grad_pair_bias, totals(of_bias));
  }
  if (s.c.global_level) report.check("grad_x of the global level", grad_x, of_x);
  for (size_t i = 0; i < grad_convolutions.size(); ++i)
    report.check(((i % 2 ? "grad_bias " : "grad_weight ") + std::to_string(i / 2)).c_str(), grad_convolutions[i],
                 totals(of_convolutions[i]));
  workspace.values("workspace");
  int64_t outputs = s.c.frame_level ? grad_pair_preactivation.bytes() : 0;
  if (s.c.global_level) outputs += grad_x.bytes();
  report.time("backward context", s.context_bytes() + grad_context.bytes() + outputs, launch);
}

// grad_x is added to the global level's part where there is one.
void backward_norm(Report& report, Setting& s, Rows rows) {
  const int64_t size = s.count(rows) * s.columns(rows);
  const Input grad_normalized(size, s.dtype, s.random), before(size, s.wide, s.random);
  const Array normalized(size, s.dtype), statistics(2 * s.count(rows), s.wide), grad_preactivation(size, s.dtype),
      fresh(size, s.wide);
  const Array& grad_x = s.c.global_level ? before.array : fresh;
  auto p = s.of_norm<inti::cuda::ClassLevelsBackwardNorm>(rows);
  p.grad_normalized = grad_normalized.data();
  p.normalized = normalized.data();
  p.statistics = statistics.data();
  p.grad_preactivation = rows == kPairs ? grad_preactivation.data() : nullptr;
  p.grad_x = rows == kFrames ? grad_x.data() : nullptr;
  p.accumulate = s.c.global_level;
  const auto launch = [&] { inti::cuda::class_levels_backward_norm(p); };
  launch();
  synchronize();

  const std::string of = kRows[rows];
  const Norm& norm = s.norms[rows];
  s.with_rows(rows, [&](const auto& in, const Input* position) {
    report.check(("statistics " + of).c_str(), statistics, reference::statistics(in, position, Setting::kEps, s.with));
    const auto measured = reference::exactly(statistics.values("statistics"));
    const auto expected = reference::normalized(in, position, measured, norm.weight, norm.bias, s.with);
    report.check(("normalized again " + of).c_str(), normalized, reference::stored(expected, s.dtype));
    auto grads = reference::norm_backward(in, position, measured, norm.weight, grad_normalized, s.with).x;
    if (rows == kFrames) {
      if (p.accumulate) reference::add_to(grads, before.values, s.wide, s.with);
      report.check("grad_x", grad_x, grads);
      return;
    }
    for (size_t i = 0; i < grads.size(); ++i)
      grads[i] = s.with.multiply(grads[i], s.with.gelu_slope({s.preactivation.values[i], 0}));
    report.check("grad_preactivation", grad_preactivation, reference::stored(grads, s.dtype));
  });
  const int64_t gradient = rows == kPairs ? grad_preactivation.bytes() : (p.accumulate ? 2 : 1) * grad_x.bytes();
  report.time(("backward norm " + of).c_str(),
              s.bytes(rows) + grad_normalized.bytes() + normalized.bytes() + statistics.bytes() + gradient, launch);
}

void backward_sums(Report& report, Setting& s) {
  const Input grad_preactivation(s.frames * s.c.half, s.dtype, s.random);
  const Array grad_bias(s.c.half, s.dtype);
  std::vector<Input> statistics, grad_normalized;
  std::vector<Array> grad_weights, grad_biases;
  auto p = s.parameters<inti::cuda::ClassLevelsBackwardSums>();
  p.preactivation = s.preactivation.data();
  p.grad_preactivation = grad_preactivation.data();
  p.grad_bias = grad_bias.data();
  int64_t bytes = s.x.bytes() + s.preactivation.bytes() + grad_preactivation.bytes();
  for (const Rows rows : {kFrames, kPairs}) {
    statistics.emplace_back(2 * s.count(rows), s.wide, s.random, 0.5, 1);
    grad_normalized.emplace_back(s.count(rows) * s.columns(rows), s.dtype, s.random);
    p.statistics[rows] = statistics.back().data();
    p.grad_normalized[rows] = grad_normalized.back().data();
    p.grad_norm_weight[rows] = grad_weights.emplace_back(s.columns(rows), s.dtype).data();
    p.grad_norm_bias[rows] = grad_biases.emplace_back(s.columns(rows), s.dtype).data();
    bytes += statistics.back().bytes() + grad_normalized.back().bytes();
  }
  const auto launch = [&] { inti::cuda::class_levels_backward_sums(p); };
  launch();
  synchronize();

  for (const Rows rows : {kFrames, kPairs})
    s.with_rows(rows, [&](const auto& in, const Input* position) {
      const auto grads = reference::norm_backward(in, position, reference::exactly(statistics[rows].values),
                                                  s.norms[rows].weight, grad_normalized[rows], s.with);
      const std::string of = kRows[rows];
      report.check(("grad_norm_weight " + of).c_str(), grad_weights[rows], reference::stored(grads.weight, s.dtype));
      report.check(("grad_norm_bias " + of).c_str(), grad_biases[rows], reference::stored(grads.bias, s.dtype));
    });
  std::vector<Sum> sums(static_cast<size_t>(s.c.half));
  for (int64_t i = 0; i < grad_preactivation.array.size(); ++i)
    sums[static_cast<size_t>(i % s.c.half)].add_product(1, grad_preactivation[i]);
  reference::Values of_bias;
  for (const Sum& sum : sums) of_bias.push_back(sum.total(s.with));
  report.check("grad_bias", grad_bias, reference::stored(of_bias, s.dtype));
  report.time("backward sums", bytes, launch);
}

}  // namespace

void check_class_levels(Report& report, int64_t real_clips) {
  for (const Case& c : cases(real_clips)) {
    report.run(c.name, [&] {
      Setting s(c, report.dtype());
      context(report, s);
      backward_context(report, s);
      if (c.frame_level) {
        for (const Rows rows : {kFrames, kPairs}) {
          normalize(report, s, rows);
          backward_norm(report, s, rows);
        }
        backward_sums(report, s);
      }
      s.x.array.check_unchanged("x");
      s.preactivation.array.check_unchanged("preactivation");
      s.pair_preactivation.array.check_unchanged("pair_preactivation");
    });
  }
}

}  // namespace standalone
