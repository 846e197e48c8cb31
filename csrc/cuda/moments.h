// Mean and variance in one pass, safe from a mean that is large beside the deviations: sums are of deviations from the
// mean so far, and two parts are merged by Chan's formula.
#pragma once

#include "inti/device.h"

namespace inti::cuda {

template <class W>
struct Moments {
  W count = 0, mean = 0, squares = 0;  // squares: Σ (x - mean)²

  __device__ __forceinline__ void merge(W others, W other_mean, W other_squares) {
    const W total = count + others;
    if (!(total > 0)) return;
    const W share = others / total, between = other_mean - mean;
    mean += between * share;
    squares += other_squares + between * between * (count * share);
    count = total;
  }

  template <int N>
  __device__ __forceinline__ void add(const Vec<W, N>& run) {
    W sum = 0, around = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) sum += run[k];
    sum *= static_cast<W>(1.0 / N);
#pragma unroll
    for (int k = 0; k < N; ++k) around += (run[k] - sum) * (run[k] - sum);
    merge(N, sum, around);
  }

  // All of so many neighbouring lanes end with what they have together.
  template <int LANES>
  __device__ __forceinline__ void over_lanes() {
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
      const W others = __shfl_down_sync(0xffffffffu, count, distance);
      const W other_mean = __shfl_down_sync(0xffffffffu, mean, distance);
      const W other_squares = __shfl_down_sync(0xffffffffu, squares, distance);
      merge(others, other_mean, other_squares);
    }
    // The first's, for all: the order of a merge shows in the last digit.
    const int first = threadIdx.x % 32 / LANES * LANES;
    count = __shfl_sync(0xffffffffu, count, first);
    mean = __shfl_sync(0xffffffffu, mean, first);
    squares = __shfl_sync(0xffffffffu, squares, first);
  }

  __device__ __forceinline__ W variance() const { return squares / count; }
};

}  // namespace inti::cuda
