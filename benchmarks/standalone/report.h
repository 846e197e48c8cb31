// What is run, and how it went.
#pragma once

#include <algorithm>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "tensors.h"

namespace standalone {

// An op's results so far. One line an output:
//   CHECK <op> <what> <dtype> max_error=<e> bound=<b> of_bound=<r> ok|FAIL  [case]
// max_error: the largest |kernel - double loop|; bound: what was allowed there; both over the largest magnitude of the
// output. of_bound: the largest share of its own bound that any element took, which is what decides.
class Report {
 public:
  Report(const char* op, DType dtype, bool times) : op_(op), dtype_(dtype), times_(times) {}

  // Runs a case; what it throws is a failure of this case.
  void run(const std::string& name, const std::function<void()>& body) {
    case_ = name;
    try {
      body();
    } catch (const std::exception& error) {
      std::printf("CHECK %s error %s FAIL  [%s]: %s\n", op_, format_of(dtype_).name, name.c_str(), error.what());
      failed_ = true;
    }
  }

  // An output against what the loops say of each element.
  void check(const char* what, const Array& output, const std::vector<Bounded>& expected) {
    const std::vector<double> values = output.values(what);
    if (values.size() != expected.size()) throw std::logic_error(std::string(what) + ": sizes differ");
    double scale = 0, error = 0, bound = 0, share = 0;
    size_t worst = 0;
    for (size_t i = 0; i < values.size(); ++i) {
      double off = std::fabs(values[i] - expected[i].value);
      if (!(off <= std::numeric_limits<double>::max())) off = std::numeric_limits<double>::infinity();  // NaN too
      const double taken = off == 0 ? 0 : off / expected[i].error;
      if (off > error || i == 0) {
        error = off;
        bound = expected[i].error;
      }
      if (taken > share) {
        share = taken;
        worst = i;
      }
      // Numbers that are 0 but for rounding are no measure.
      if (std::fabs(expected[i].value) > expected[i].error) scale = std::max(scale, std::fabs(expected[i].value));
    }
    if (scale == 0) scale = 1;
    const bool ok = share <= 1;
    std::printf("CHECK %s %s %s max_error=%.3g bound=%.3g of_bound=%.3g %s  [%s]\n", op_, what,
                format_of(output.dtype()).name, error / scale, bound / scale, share, ok ? "ok" : "FAIL", case_.c_str());
    if (!ok) {
      std::printf("  element %zu of %zu: expected %.9g ± %.3g, got %.9g\n", worst, values.size(), expected[worst].value,
                  expected[worst].error, values[worst]);
      failed_ = true;
    }
    max_error_ = std::max(max_error_, error / scale);
  }

  // Of a case that stands for real use: the median time of a launch, if times are wanted.
  void time(const char* entry, int64_t least_bytes, const std::function<void()>& launch);

  double max_error() const { return max_error_; }
  bool failed() const { return failed_; }
  DType dtype() const { return dtype_; }

 private:
  const char* op_;
  DType dtype_;
  bool times_;
  std::string case_;
  double max_error_ = 0;
  bool failed_ = false;
};

// Each op's cases, a file each: small ones, or with a number of clips one of ViT-B's size, 16 frames of 14×14 patches
// and a class token.
void check_pair_interpolate(Report&, int64_t real_clips);
void check_depthwise_conv3d(Report&, int64_t real_clips);
void check_token_features(Report&, int64_t real_clips);
void check_interpolation_head(Report&, int64_t real_clips);
void check_class_levels(Report&, int64_t real_clips);
// Of no real size.
void check_partial_sums(Report&, int64_t real_clips);

#ifdef INTI_EMULATED

inline void Report::time(const char*, int64_t, const std::function<void()>&) {}

#else

// Medians of CUDA events round single launches, after some that warm up. The kernels' own launch costs are in it where
// an entry point launches several.
inline void Report::time(const char* entry, int64_t least_bytes, const std::function<void()>& launch) {
  if (!times_) return;
  constexpr int kWarm = 10, kRuns = 100;
  cudaEvent_t begin, end;
  standalone::check(cudaEventCreate(&begin), "cudaEventCreate");
  standalone::check(cudaEventCreate(&end), "cudaEventCreate");
  const auto in = static_cast<cudaStream_t>(stream());
  std::vector<float> milliseconds(kRuns);
  for (int i = -kWarm; i < kRuns; ++i) {
    standalone::check(cudaEventRecord(begin, in), "cudaEventRecord");
    launch();
    standalone::check(cudaEventRecord(end, in), "cudaEventRecord");
    standalone::check(cudaEventSynchronize(end), "a timed launch");
    float elapsed = 0;
    standalone::check(cudaEventElapsedTime(&elapsed, begin, end), "cudaEventElapsedTime");
    if (i >= 0) milliseconds[static_cast<size_t>(i)] = elapsed;
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::sort(milliseconds.begin(), milliseconds.end());
  const double median = milliseconds[kRuns / 2];
  std::printf("TIME %s %s %s median_us=%.1f GB/s=%.0f  (least bytes %lld) [%s]\n", op_, entry, format_of(dtype_).name,
              1000 * median, static_cast<double>(least_bytes) / median * 1e-6, static_cast<long long>(least_bytes),
              case_.c_str());
}

#endif

}  // namespace standalone
