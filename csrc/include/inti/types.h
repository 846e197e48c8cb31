// What every entry point speaks: plain numbers and pointers, nothing of PyTorch or Python.
#pragma once

#ifdef __CUDACC_RTC__  // NVRTC has no standard headers
namespace inti {
using int64_t = long long;
}
#else
#include <cstdint>
#endif

namespace inti {

enum class DType { float32, float64, bfloat16, float16 };

// Tokens [batch, frames, tokens, dim]: dim is contiguous, the other three axes have any stride (0 included).
struct Strides {
  int64_t batch, frame, token;  // in elements
};

}  // namespace inti
