// Sums of blocks' partial sums, in a fixed order: the same bits at every run, and no float atomics.
#pragma once

#include "inti/cuda/partial_sums.h"
#include "inti/device.h"

namespace inti::cuda {

constexpr int kSumThreads = 256, kSumColumns = 32;  // of a block

// A sum's columns that a block takes: 32, or where there are fewer so many that its threads share the rows.
__device__ __forceinline__ int sum_lanes(int64_t columns) {
  int lanes = kSumColumns;
  while (lanes / 2 >= columns && lanes > 1) lanes /= 2;
  return lanes;
}

// Of a thread's column and rows: four loads are under way.
template <class W>
__device__ __forceinline__ void add_partials(const PartialSum& p, int64_t column, int group, int groups, W (&sums)[4]) {
  const int64_t step = groups * p.pitch;
  const W* at = static_cast<const W*>(p.partials) + group * p.pitch + column / p.run * p.run_pitch + column % p.run;
  int64_t k = group;
  for (; k + 3 * groups < p.rows; k += 4 * groups, at += 4 * step) {
#pragma unroll
    for (int n = 0; n < 4; ++n) sums[n] += load(at + n * step);
  }
  for (; k < p.rows; k += groups, at += step) sums[0] += load(at);
}

// A warp reads 32 neighbours at once, and the eight warps of a block share the rows, so that many rows of few sums, as
// large batches give, don't wait for each other. 256 threads, 4 blocks an SM.
template <class W>
__global__ void __launch_bounds__(kSumThreads, 4) partial_sums_kernel(const PartialSums p) {
  int which = 0;
  int64_t block = blockIdx.x;
  while (true) {
    const int64_t columns = p.sums[which].columns, blocks = (columns + kSumColumns - 1) / kSumColumns;
    if (block < blocks) break;
    block -= blocks;
    while (p.sums[which].goes_on) ++which;
    ++which;
  }
  const int64_t columns = p.sums[which].columns;
  const int lanes = sum_lanes(columns), groups = kSumThreads / lanes;
  const int group = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  const int64_t column = block * kSumColumns + lane;
  W sums[4] = {};
  if (column < columns) {
    add_partials(p.sums[which], column, group, groups, sums);
    for (int next = which; p.sums[next].goes_on; ++next) add_partials(p.sums[next + 1], column, group, groups, sums);
  }
  const Shared<W> shared = dynamic_shared<W>(0);  // [groups, lanes]
  W sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  store(shared + threadIdx.x, sum);
  // Halves onto halves: a chain of 256, which a lone column would be, is slower and rounds more than PyTorch's sum
  // does.
  for (int half = groups / 2; half > 0; half /= 2) {
    __syncthreads();
    if (group < half) {
      sum += load(shared + threadIdx.x + half * lanes);
      store(shared + threadIdx.x, sum);
    }
  }
  if (group == 0 && column < columns)
    write(p.sums[which].to, p.sums[which].dtype, column, p.sums[which].negated ? -sum : sum);
}

// --- Host ------------------------------------------------------------------------------------------------------------
#ifndef __CUDACC_RTC__

inline void launch_partial_sums(const PartialSums& p) {
  if (p.count < 0 || p.count > kMostPartialSums)
    throw std::invalid_argument("inti_kernels: partial_sums takes up to 16 sums");
  int64_t blocks = 0;
  for (int i = 0; i < p.count; ++i) {
    const bool continues = i > 0 && p.sums[i - 1].goes_on;
    if (continues && p.sums[i].columns != p.sums[i - 1].columns)
      throw std::invalid_argument("inti_kernels: partial_sums: a sum goes on with another number of columns");
    if (i + 1 == p.count && p.sums[i].goes_on)
      throw std::invalid_argument("inti_kernels: partial_sums: the last sum goes on");
    if (!continues) blocks += (p.sums[i].columns + kSumColumns - 1) / kSumColumns;
  }
  const auto start = [&](auto kernel, int bytes) {
    launch(kernel, Launch{"partial_sums_kernel", blocks, kSumThreads, kSumThreads * bytes, p.stream, kSumThreads}, p);
  };
  if (p.dtype == DType::float64)
    start(partial_sums_kernel<double>, 8);
  else
    start(partial_sums_kernel<float>, 4);
}

// The sums by which an entry point ends, of those partial sums whose output is wanted.
class SumList {
 public:
  // dtype: of the tokens.
  SumList(DType dtype, void* stream) {
    all_.dtype = wide_dtype(dtype);
    all_.stream = stream;
  }
  void add(const PartialSum& sum) {
    if (sum.to) all_.sums[all_.count++] = sum;
  }
  // Of contiguous partial sums [rows, columns].
  void add(void* to, DType dtype, const void* partials, int64_t rows, int64_t columns) {
    add({partials, rows, columns, columns, columns, columns, to, dtype, false, false});
  }
  // To an array of the partial sums' own dtype.
  void add_wide(void* to, const void* partials, int64_t rows, int64_t columns) {
    add(to, all_.dtype, partials, rows, columns);
  }
  // To [2, columns], the second row less itself.
  void add_both_signs(void* to, DType dtype, const void* partials, int64_t rows, int64_t columns) {
    if (!to) return;
    add(to, dtype, partials, rows, columns);
    void* second = element(to, dtype, columns);
    add({partials, rows, columns, columns, columns, columns, second, dtype, true, false});
  }
  void launch() const {
    if (all_.count) launch_partial_sums(all_);
  }
  // The address of an array's element.
  static void* element(void* array, DType dtype, int64_t i) {
    const int bytes = dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
    return static_cast<char*>(array) + i * bytes;
  }

 private:
  PartialSums all_{};
};

#endif  // __CUDACC_RTC__

}  // namespace inti::cuda
