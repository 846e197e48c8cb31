// partial_sums: what a backward ends by. The first case is as three ops leave it, their sums of position in one.
#include "inti/cuda/partial_sums.h"

#include "reference.h"
#include "report.h"

namespace standalone {
namespace {

// [rows, columns] in runs, `gap` numbers behind each run and each row that belong to nobody.
struct Part {
  int64_t rows, columns, run, gap;
  bool negated = false, goes_on = false;
};
struct Case {
  const char* name;
  std::vector<Part> parts;
};

std::vector<Case> cases() {
  return {
      {"position of three, taps and biases",
       {{40, 96, 96, 0, false, true},
        {7, 96, 96, 0, false, true},
        {21, 96, 96, 0},
        {13, 27 * 40, 27, 1},
        {13, 40, 1, 27},
        {160, 72, 72, 0},
        {160, 72, 72, 0, true}}},
      {"one column", {{1, 1, 1, 0}, {2000, 1, 1, 0, true}, {255, 1, 1, 3}}},
      {"few columns", {{300, 2, 2, 0}, {65, 5, 5, 1}, {9, 16, 4, 4}, {33, 17, 17, 0}, {8, 31, 31, 2}}},
      {"no rows", {{0, 40, 40, 0}, {3, 32, 32, 0}, {4, 33, 33, 0}}},
      {"sixteen", std::vector<Part>(16, Part{11, 50, 50, 0})},
  };
}

void run(Report& report, const Case& c) {
  Random random{0x5a45};
  const DType dtype = report.dtype(), wide = wide_of(dtype);
  const Arithmetic with(wide);
  inti::cuda::PartialSums p{};
  p.dtype = wide;
  p.stream = stream();
  std::vector<Input> partials;
  std::vector<Array> outputs;
  std::vector<reference::Values> expected;
  std::vector<Sum> sums;
  for (const Part& part : c.parts) {
    const int64_t run_pitch = part.run + part.gap, pitch = part.columns / part.run * run_pitch + part.gap;
    partials.emplace_back(std::max<int64_t>(part.rows, 1) * pitch, wide, random);
    sums.resize(static_cast<size_t>(part.columns));
    for (int64_t row = 0; row < part.rows; ++row)
      for (int64_t i = 0; i < part.columns; ++i)
        sums[static_cast<size_t>(i)].add_product(
            part.negated ? -1 : 1, partials.back()[row * pitch + i / part.run * run_pitch + i % part.run]);
    inti::cuda::PartialSum& sum = p.sums[p.count++];
    sum = {partials.back().data(), part.rows,   pitch, part.columns, part.run, run_pitch, nullptr, dtype,
           part.negated,           part.goes_on};
    if (part.goes_on) continue;
    outputs.emplace_back(part.columns, dtype);
    expected.emplace_back();
    for (const Sum& total : sums) expected.back().push_back(total.total(with));
    sums.clear();
    // The first of a sum's parts says where it goes.
    int first = p.count - 1;
    while (first > 0 && p.sums[first - 1].goes_on) --first;
    p.sums[first].to = outputs.back().data();
  }
  inti::cuda::partial_sums(p);
  synchronize();
  for (size_t i = 0; i < outputs.size(); ++i)
    report.check(("sum " + std::to_string(i)).c_str(), outputs[i], reference::stored(expected[i], dtype));
  for (const Input& input : partials) input.array.check_unchanged("partials");
}

}  // namespace

void check_partial_sums(Report& report, int64_t real_clips) {
  if (real_clips) return;
  for (const Case& c : cases()) report.run(c.name, [&] { run(report, c); });
}

}  // namespace standalone
