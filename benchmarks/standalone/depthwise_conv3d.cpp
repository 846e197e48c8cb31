// depthwise_conv3d: forward and backward of its three kernels.
#include "inti/cuda/depthwise_conv3d.h"

#include <optional>
#include <string>

#include "left_over.h"
#include "reference.h"
#include "report.h"

namespace standalone {
namespace {

struct Kernel {
  const char* name;
  int space;
  int64_t stride;
};
const Kernel kKernels[] = {{"3x3x3/2", 3, 2}, {"3x3x3/1", 3, 1}, {"3x1x1/1", 1, 1}};

struct Case {
  const char* name;
  int64_t batch, frames, prefix, height, width, dim;
  Layout x = Layout::contiguous, grad_y = Layout::contiguous;
  bool position = true, bias = true, accumulate = false;
  bool wants_x = true, wants_position = true, wants_parameters = true;
  bool float32_parameters = false;
  bool deferred = false;  // the sums are left to partial_sums
};

std::vector<Case> cases(int64_t real_clips) {
  if (real_clips) return {{"real", real_clips, 16, 1, 14, 14, 768}};
  Case bare{"no position, no bias", 1, 2, 1, 3, 9, 16};
  bare.position = bare.bias = bare.wants_position = false;
  Case added{"accumulate, mixed parameters", 1, 4, 1, 6, 7, 24, Layout::contiguous, Layout::swapped};
  added.accumulate = added.float32_parameters = true;
  Case of_x{"grad_x only", 1, 4, 1, 5, 6, 16}, of_position{"grad_position only", 1, 4, 1, 5, 6, 16},
      of_parameters{"grad_weight, grad_bias only", 1, 4, 1, 5, 6, 16};
  of_x.wants_position = of_x.wants_parameters = false;
  of_position.wants_x = of_position.wants_parameters = false;
  of_parameters.wants_x = of_parameters.wants_position = false;
  Case deferred{"sums left over", 2, 4, 1, 6, 7, 24};
  deferred.deferred = true;
  return {
      {"whole frame", 1, 6, 1, 14, 14, 40},
      {"several tiles, ragged", 1, 4, 2, 13, 51, 24},
      {"tall", 1, 2, 0, 37, 5, 16},
      {"padded rows", 2, 2, 1, 5, 8, 24, Layout::padded, Layout::padded},
      {"frames first", 3, 4, 1, 4, 7, 16, Layout::swapped, Layout::repeated},
      {"odd rows", 2, 4, 1, 5, 9, 19, Layout::odd, Layout::odd},
      {"shifted", 1, 4, 1, 5, 9, 24, Layout::shifted, Layout::shifted},
      {"one patch", 1, 2, 0, 1, 1, 1},
      {"many clips, long runs", 41, 6, 1, 2, 2, 64},
      bare,
      added,
      of_x,
      of_position,
      of_parameters,
      deferred,
  };
}

struct Setting {
  const Case& c;
  const Kernel& kernel;
  Random random{0xc0de};
  DType dtype, parameter_dtype, wide;
  Arithmetic with;
  reference::Convolution conv;
  Tokens x;
  Input weight;
  std::optional<Input> bias, position;

  Setting(const Case& c, const Kernel& kernel, DType dtype)
      : c(c),
        kernel(kernel),
        dtype(dtype),
        parameter_dtype(c.float32_parameters && dtype != DType::float64 ? DType::float32 : dtype),
        wide(wide_of(dtype)),
        with(wide),
        conv{kernel.stride, c.prefix, c.height, c.width, kernel.space},
        x({c.batch, c.frames, c.prefix + c.height * c.width, c.dim}, c.x, dtype, random),
        weight(c.dim * conv.taps(), parameter_dtype, random, 0.5) {
    if (c.bias) bias.emplace(c.dim, parameter_dtype, random);
    if (c.position) position.emplace(c.frames * c.dim, wide, random);
  }
  const Input* position_or_null() const { return position ? &*position : nullptr; }
  TokenSizes out() const { return {c.batch, c.frames / kernel.stride, x.sizes.tokens, c.dim}; }
  inti::cuda::DepthwiseConv3dShape shape() const {
    return {c.batch, c.frames, c.prefix, c.height, c.width, c.dim, kernel.stride, kernel.space, dtype, parameter_dtype};
  }
  std::string entry(const char* what) const { return std::string(what) + " " + kernel.name; }
};

void forward(Report& report, const Setting& s) {
  const Array y(s.out().size(), s.dtype);
  inti::cuda::DepthwiseConv3dForward p{};
  p.shape = s.shape();
  p.x = s.x.data();
  p.x_strides = s.x.strides;
  p.weight = s.weight.data();
  p.bias = s.bias ? s.bias->data() : nullptr;
  p.position = s.position ? s.position->data() : nullptr;
  p.y = y.data();
  p.stream = stream();
  const auto launch = [&] { inti::cuda::depthwise_conv3d_forward(p); };
  launch();
  synchronize();

  const auto expected =
      reference::convolve(s.conv, s.x, s.position_or_null(), s.weight, s.bias ? &*s.bias : nullptr, s.with);
  report.check("y", y, reference::stored(expected, s.dtype, true));
  report.time(s.entry("forward").c_str(), s.x.bytes() + y.bytes(), launch);
}

void backward(Report& report, Setting& s) {
  const Case& c = s.c;
  const Tokens grad_y(s.out(), c.grad_y, s.dtype, s.random);
  const Input before(s.x.sizes.size(), s.dtype, s.random);  // what grad_x is added to
  const Array fresh(s.x.sizes.size(), s.dtype), grad_position(c.frames * c.dim, s.wide),
      grad_weight(s.weight.array.size(), s.parameter_dtype), grad_bias(c.dim, s.parameter_dtype);
  const Array& grad_x = c.accumulate ? before.array : fresh;
  const auto tiling = inti::cuda::depthwise_conv3d_tiling(s.shape());
  const Array position_partials(c.batch * tiling.tiles * c.frames * c.dim, s.wide),
      weight_partials(c.batch * tiling.runs * tiling.tiles * c.dim * (s.conv.taps() + 1), s.wide);

  inti::cuda::DepthwiseConv3dBackward p{};
  p.shape = s.shape();
  p.x = s.x.data();
  p.x_strides = s.x.strides;
  p.weight = s.weight.data();
  p.position = s.position ? s.position->data() : nullptr;
  p.grad_y = grad_y.data();
  p.grad_y_strides = grad_y.strides;
  p.grad_x = c.wants_x ? grad_x.data() : nullptr;
  p.accumulate = c.accumulate;
  p.grad_position = c.wants_position ? grad_position.data() : nullptr;
  p.position_partials = c.wants_position ? position_partials.data() : nullptr;
  p.grad_weight = c.wants_parameters ? grad_weight.data() : nullptr;
  p.grad_bias = c.wants_parameters && c.bias ? grad_bias.data() : nullptr;
  p.weight_partials = c.wants_parameters ? weight_partials.data() : nullptr;
  p.stream = stream();
  const auto launch = [&] {
    if (!c.deferred) return inti::cuda::depthwise_conv3d_backward(p);
    auto q = p;
    q.grad_position = q.grad_weight = q.grad_bias = nullptr;
    inti::cuda::depthwise_conv3d_backward(q);
    const int64_t taps = s.conv.taps(), pitch = c.dim * (taps + 1);
    LeftOver sums(s.wide);
    sums.add(position_partials, c.frames * c.dim, grad_position);
    sums.add(weight_partials, 0, pitch, c.dim * taps, taps, taps + 1, grad_weight);
    sums.add(weight_partials, taps, pitch, c.dim, 1, taps + 1, grad_bias);
    sums.launch();
  };
  launch();
  synchronize();

  auto expected = reference::convolve_backward(s.conv, s.x, s.position_or_null(), s.weight, grad_y, s.with);
  if (c.accumulate) reference::add_to(expected.x, before.values, s.dtype, s.with);
  if (p.grad_x) report.check("grad_x", grad_x, reference::stored(expected.x, s.dtype, true));
  if (p.grad_position) report.check("grad_position", grad_position, expected.position);
  if (p.grad_weight) report.check("grad_weight", grad_weight, reference::stored(expected.weight, s.parameter_dtype));
  if (p.grad_bias) report.check("grad_bias", grad_bias, reference::stored(expected.bias, s.parameter_dtype));
  position_partials.values("position_partials");
  weight_partials.values("weight_partials");
  grad_y.array.check_unchanged("grad_y");
  report.time(s.entry("backward").c_str(), s.x.bytes() + grad_y.bytes() + grad_x.bytes(), launch);
}

}  // namespace

void check_depthwise_conv3d(Report& report, int64_t real_clips) {
  for (const Kernel& kernel : kKernels) {
    for (const Case& c : cases(real_clips)) {
      report.run(std::string(kernel.name) + ", " + c.name, [&] {
        Setting setting(c, kernel, report.dtype());
        forward(report, setting);
        backward(report, setting);
        setting.x.array.check_unchanged("x");
      });
    }
  }
}

}  // namespace standalone
