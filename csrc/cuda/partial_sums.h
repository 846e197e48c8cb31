// Sums of blocks' partial sums, in a fixed order: the same bits at every run, and no float atomics.
#pragma once

#include "inti/device.h"

namespace inti::cuda {

// Where a sum goes: element i of an array of any dtype.
struct StoreAs {
  void* to;
  DType dtype;
  template <class W>
  __device__ __forceinline__ void operator()(int64_t i, W sum) const {
    write(to, dtype, i, sum);
  }
};

constexpr int kSumColumns = 32, kSumGroups = 8;

// store(i, Σ_k partials[k, i]).  partials: [count, size]. A warp reads 32 neighbours at once, and the eight warps of a
// block share the rows, so that many rows of few sums, as large batches give, don't wait for each other.
// 256 threads, 4 blocks an SM.
template <class W, class Store>
__global__ void __launch_bounds__(kSumColumns* kSumGroups, 4)
    sum_partials_kernel(const W* partials, int64_t count, int64_t size, Store to) {
  const int column = threadIdx.x % kSumColumns, group = threadIdx.x / kSumColumns;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumColumns + column;
  W sums[4] = {};
  if (i < size) {
    const int64_t step = static_cast<int64_t>(kSumGroups) * size;
    const W* at = partials + group * size + i;
    int64_t k = group;
    for (; k + 3 * kSumGroups < count; k += 4 * kSumGroups, at += 4 * step) {
#pragma unroll
      for (int n = 0; n < 4; ++n) sums[n] += load(at + n * step);
    }
    for (; k < count; k += kSumGroups, at += step) sums[0] += load(at);
  }
  const Shared<W> shared = dynamic_shared<W>(0);  // [groups, columns]
  store(shared + threadIdx.x, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  __syncthreads();
  if (group == 0 && i < size) {
    W sum = 0;
#pragma unroll
    for (int n = 0; n < kSumGroups; ++n) sum += load(shared + n * kSumColumns + column);
    to(i, sum);
  }
}

#ifndef __CUDACC_RTC__
// To an array of W itself.
template <class W>
StoreAs store_wide(void* to) {
  return {to, sizeof(W) == 8 ? DType::float64 : DType::float32};
}

template <class W, class Store>
void sum_partials(const void* partials, int64_t count, int64_t size, Store to, void* stream) {
  const int threads = kSumColumns * kSumGroups;
  const Launch how{"sum_partials_kernel", (size + kSumColumns - 1) / kSumColumns, threads,
                   threads * static_cast<int>(sizeof(W)), stream};
  launch(sum_partials_kernel<W, Store>, how, static_cast<const W*>(partials), count, size, to);
}
#endif

}  // namespace inti::cuda
