// pair_interpolate: forward and backward.
#include "inti/cuda/pair_interpolate.h"

#include <optional>

#include "left_over.h"
#include "reference.h"
#include "report.h"

namespace standalone {
namespace {

struct Case {
  const char* name;
  TokenSizes sizes;
  Layout x = Layout::contiguous, grad_z = Layout::contiguous;
  bool position = true, accumulate = false;
  bool wants_x = true, wants_logits = true, wants_position = true;
  double logits_scale = 3;
  bool float32_logits = false;
  bool deferred = false;  // the sums are left to partial_sums
};

std::vector<Case> cases(int64_t real_clips) {
  if (real_clips) return {{"real", {real_clips, 16, 197, 768}}};
  Case bare{"no position", {1, 2, 16, 16}};
  bare.position = bare.wants_position = false;
  Case added{"accumulate, mixed logits", {1, 4, 21, 24}, Layout::contiguous, Layout::swapped};
  added.accumulate = added.float32_logits = true;
  Case extreme{"extreme logits", {1, 2, 40, 8}};
  extreme.logits_scale = 1000;
  Case of_x{"grad_x only", {1, 2, 9, 16}}, of_logits{"grad_logits only", {1, 2, 9, 16}},
      of_position{"grad_position only", {1, 2, 9, 16}};
  of_x.wants_logits = of_x.wants_position = false;
  of_logits.wants_x = of_logits.wants_position = false;
  of_position.wants_x = of_position.wants_logits = false;
  Case deferred{"sums left over", {2, 4, 19, 24}};
  deferred.deferred = true;
  return {
      {"several tiles, ragged", {2, 4, 37, 264}},
      {"many clips, full tiles", {40, 4, 37, 24}},
      {"padded rows", {2, 2, 19, 40}, Layout::padded, Layout::padded},
      {"frames first", {3, 4, 10, 32}, Layout::swapped, Layout::repeated},
      {"odd rows", {2, 2, 18, 33}, Layout::odd, Layout::odd},
      {"shifted", {1, 2, 18, 40}, Layout::shifted, Layout::shifted},
      {"one number", {1, 2, 1, 1}},
      bare,
      added,
      extreme,
      of_x,
      of_logits,
      of_position,
      deferred,
  };
}

struct Setting {
  const Case& c;
  Random random{0x1ed7};
  DType dtype, logits_dtype, wide;
  Arithmetic with;
  int64_t pairs;
  Tokens x;
  Input logits;
  std::optional<Input> position;
  std::vector<reference::PairWeights> weights;

  Setting(const Case& c, DType dtype)
      : c(c),
        dtype(dtype),
        logits_dtype(c.float32_logits && dtype != DType::float64 ? DType::float32 : dtype),
        wide(wide_of(dtype)),
        with(wide),
        pairs(c.sizes.batch * (c.sizes.frames / 2) * c.sizes.tokens),
        x(c.sizes, c.x, dtype, random),
        logits(2 * pairs, logits_dtype, random, c.logits_scale) {
    if (c.position) position.emplace(c.sizes.frames * c.sizes.dim, wide, random);
    for (int64_t i = 0; i < pairs; ++i)
      weights.push_back(
          reference::weights_of(with.subtract(with.exact(logits[2 * i]), with.exact(logits[2 * i + 1])), with));
  }
  const Input* position_or_null() const { return position ? &*position : nullptr; }
  inti::cuda::PairInterpolateShape shape() const {
    return {c.sizes.batch, c.sizes.frames, c.sizes.tokens, c.sizes.dim, dtype, logits_dtype};
  }
};

void forward(Report& report, const Setting& s) {
  const Array z(s.pairs * s.c.sizes.dim, s.dtype), weights(2 * s.pairs, s.logits_dtype);
  inti::cuda::PairInterpolateForward p{};
  p.shape = s.shape();
  p.x = s.x.data();
  p.x_strides = s.x.strides;
  p.logits = s.logits.data();
  p.position = s.position ? s.position->data() : nullptr;
  p.z = z.data();
  p.weights = weights.data();
  p.stream = stream();
  const auto launch = [&] { inti::cuda::pair_interpolate_forward(p); };
  launch();
  synchronize();

  report.check("z", z,
               reference::stored(reference::interpolate(s.x, s.position_or_null(), s.weights, s.with), s.dtype));
  reference::Values both;
  for (const auto& pair : s.weights) {
    both.push_back(stored(pair.first, s.logits_dtype));
    both.push_back(stored(pair.second, s.logits_dtype));
  }
  report.check("weights", weights, both);
  report.time("forward", s.x.bytes() + s.logits.bytes() + z.bytes() + weights.bytes(), launch);
}

void backward(Report& report, Setting& s) {
  const TokenSizes& sizes = s.c.sizes;
  const Tokens grad_z({sizes.batch, sizes.frames / 2, sizes.tokens, sizes.dim}, s.c.grad_z, s.dtype, s.random);
  const Input grad_weights(2 * s.pairs, s.logits_dtype, s.random);
  const Input before(sizes.size(), s.dtype, s.random);  // what grad_x is added to
  const Array fresh(sizes.size(), s.dtype), grad_logits(2 * s.pairs, s.logits_dtype),
      grad_position(sizes.frames * sizes.dim, s.wide);
  const Array& grad_x = s.c.accumulate ? before.array : fresh;
  const int64_t tiles = inti::cuda::pair_interpolate_tiles(sizes.batch, sizes.frames, sizes.tokens);
  const Array partials(sizes.batch * tiles * sizes.frames * sizes.dim, s.wide);

  inti::cuda::PairInterpolateBackward p{};
  p.shape = s.shape();
  p.x = s.x.data();
  p.x_strides = s.x.strides;
  p.logits = s.logits.data();
  p.position = s.position ? s.position->data() : nullptr;
  p.grad_z = grad_z.data();
  p.grad_z_strides = grad_z.strides;
  p.grad_weights = grad_weights.data();
  p.grad_x = s.c.wants_x ? grad_x.data() : nullptr;
  p.accumulate = s.c.accumulate;
  p.grad_logits = s.c.wants_logits ? grad_logits.data() : nullptr;
  p.grad_position = s.c.wants_position ? grad_position.data() : nullptr;
  p.partials = s.c.wants_position ? partials.data() : nullptr;
  p.stream = stream();
  const auto launch = [&] {
    if (!s.c.deferred) return inti::cuda::pair_interpolate_backward(p);
    auto q = p;
    q.grad_position = nullptr;
    inti::cuda::pair_interpolate_backward(q);
    LeftOver sums(s.wide);
    sums.add(partials, sizes.frames * sizes.dim, grad_position);
    sums.launch();
  };
  launch();
  synchronize();

  auto expected = reference::interpolate_backward(s.x, s.position_or_null(), s.weights, grad_z, grad_weights, s.with);
  if (s.c.accumulate) reference::add_to(expected.x, before.values, s.dtype, s.with);
  if (s.c.wants_x) report.check("grad_x", grad_x, reference::stored(expected.x, s.dtype));
  if (s.c.wants_logits) {
    reference::Values both;
    for (const Bounded& first : reference::stored(expected.difference, s.logits_dtype)) {
      both.push_back(first);
      both.push_back({-first.value, first.error});
    }
    report.check("grad_logits", grad_logits, both);
  }
  if (s.c.wants_position) report.check("grad_position", grad_position, expected.position);
  partials.values("partials");
  report.time("backward",
              s.x.bytes() + grad_z.bytes() + s.logits.bytes() + grad_weights.bytes() + grad_x.bytes() +
                  grad_logits.bytes() + grad_position.bytes(),
              launch);
}

}  // namespace

void check_pair_interpolate(Report& report, int64_t real_clips) {
  for (const Case& c : cases(real_clips)) {
    report.run(c.name, [&] {
      Setting setting(c, report.dtype());
      forward(report, setting);
      backward(report, setting);
      setting.x.array.check_unchanged("x");
      setting.logits.array.check_unchanged("logits");
    });
  }
}

}  // namespace standalone
