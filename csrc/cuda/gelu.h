// The exact GELU, x·Φ(x), and its slope.
#pragma once

#include "inti/device.h"

namespace inti::cuda {

// Φ, the normal distribution's cumulative.
template <class W>
__device__ __forceinline__ W normal_cdf(W x) {
  return static_cast<W>(0.5) + static_cast<W>(0.5) * error_function(x * static_cast<W>(0.70710678118654752440));
}

template <class W>
__device__ __forceinline__ W gelu(W x) {
  return x * normal_cdf(x);
}

// Both the function and its slope Φ(x) + x·φ(x), which share Φ.
template <class W>
struct Gelu {
  W value, slope;
  __device__ __forceinline__ explicit Gelu(W x) {
    const W cdf = normal_cdf(x);
    value = x * cdf;
    slope = cdf + x * static_cast<W>(0.39894228040143267794) * exponential(static_cast<W>(-0.5) * x * x);
  }
};

}  // namespace inti::cuda
