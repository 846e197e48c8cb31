// Every CUDA entry point of inti_kernels, called with raw pointers and a stream, and checked against plain loops in
// double precision. No PyTorch, no Python. See README.md.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "report.h"

namespace standalone {

// Whether the emulator plays this GPU from here on.
bool set_capability(int capability);

namespace {

struct Op {
  const char* name;
  void (*check)(Report&, int64_t real_clips);
};

const Op kOps[] = {{"pair_interpolate", check_pair_interpolate}, {"depthwise_conv3d", check_depthwise_conv3d},
                   {"token_features", check_token_features},     {"interpolation_head", check_interpolation_head},
                   {"class_levels", check_class_levels},         {"partial_sums", check_partial_sums}};

struct Options {
  std::vector<DType> dtypes;
  std::vector<Op> ops;
  int64_t real_clips = 0;
  bool times = false;
};

const char* const kUsage =
    "usage: standalone [--real] [--clips N] [--time] [--capability NN] [OP…] [DTYPE…]\n"
    "  OP           pair_interpolate, depthwise_conv3d, token_features, interpolation_head,\n"
    "               class_levels, partial_sums; default: all\n"
    "  DTYPE        float16, float32, bfloat16, float64; default: float16 float32\n"
    "  --real       one real size, 16 frames of 14×14 patches and a class token, 768 channels, instead of small ones\n"
    "  --clips N    clips of the real size, 1 unless said\n"
    "  --time       medians of the entry points at the real size (needs a GPU)\n"
    "  --capability NN  compute capability that the emulator plays, such as 80\n";

bool take_name(const std::string& name, Options& options) {
  for (const Op& op : kOps) {
    if (name == op.name) {
      options.ops.push_back(op);
      return true;
    }
  }
  for (const DType dtype : {DType::float16, DType::float32, DType::bfloat16, DType::float64}) {
    if (name == format_of(dtype).name) {
      options.dtypes.push_back(dtype);
      return true;
    }
  }
  return false;
}

// Whether the arguments were understood.
bool parse(int count, char** arguments, Options& options) {
  for (int i = 1; i < count; ++i) {
    const std::string name = arguments[i];
    const int number = i + 1 < count ? std::atoi(arguments[i + 1]) : 0;
    if (name == "--real" || name == "--time") {
      if (!options.real_clips) options.real_clips = 1;
      options.times = options.times || name == "--time";
    } else if (name == "--clips" && number > 0) {
      options.real_clips = number;
      ++i;
    } else if (name == "--capability" && number > 0) {
      if (!set_capability(number)) return false;
      ++i;
    } else if (!take_name(name, options)) {
      return false;
    }
  }
  if (options.dtypes.empty()) options.dtypes = {DType::float16, DType::float32};
  if (options.ops.empty()) options.ops.assign(std::begin(kOps), std::end(kOps));
  return true;
}

int run(const Options& options) {
  bool failed = false;
  for (const Op& op : options.ops) {
    double max_error = 0;
    bool op_failed = false;
    for (const DType dtype : options.dtypes) {
      Report report(op.name, dtype, options.times);
      op.check(report, options.real_clips);
      max_error = std::max(max_error, report.max_error());
      op_failed = op_failed || report.failed();
    }
    std::printf("RESULT %s max_error %.3g %s\n", op.name, max_error, op_failed ? "FAIL" : "ok");
    std::fflush(stdout);
    failed = failed || op_failed;
  }
  return failed ? 1 : 0;
}

}  // namespace
}  // namespace standalone

#ifdef INTI_EMULATED
#include "emulator/counting.h"

bool standalone::set_capability(int capability) {
  inti::emulator::set_compute_capability(capability);
  return true;
}
#else
bool standalone::set_capability(int) { return false; }
#endif

int main(int count, char** arguments) {
  standalone::Options options;
  if (!standalone::parse(count, arguments, options)) {
    std::fputs(standalone::kUsage, stderr);
    return 2;
  }
#ifdef INTI_EMULATED
  if (options.times) {
    std::fputs("--time needs a GPU; this program was compiled against the emulator\n", stderr);
    return 2;
  }
  std::puts("device: emulated");
#else
  cudaDeviceProp device{};
  if (cudaGetDeviceProperties(&device, 0) != cudaSuccess) {
    std::fputs("no CUDA device was found\n", stderr);
    return 2;
  }
  std::printf("device: %s, compute capability %d.%d\n", device.name, device.major, device.minor);
#endif
  return standalone::run(options);
}
