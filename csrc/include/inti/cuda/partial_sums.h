// Sums over blocks' partial sums, by which every gradient of a parameter ends: those of several entry points in one
// launch. An entry point that is given partial sums and no output leaves its partial sums to this one.
#pragma once

#include "inti/types.h"

namespace inti::cuda {

// to[i] = Σ_k partials[k, i], in a fixed order. Columns lie in runs: column i at i / run · run_pitch + i % run of a
// row.
struct PartialSum {
  const void* partials;  // PartialSums::dtype [rows, columns]
  int64_t rows, pitch;   // pitch, of rows and of runs: elements from one to the next
  int64_t columns, run, run_pitch;
  void* to;      // [columns] contiguous
  DType dtype;   // of `to`
  bool negated;  // to[i] = -Σ_k
  bool goes_on;  // the next one's rows, of as many columns, belong to this sum too; its own `to` is not looked at
};

constexpr int kMostPartialSums = 16;

struct PartialSums {
  PartialSum sums[kMostPartialSums];
  int count;
  DType dtype;  // of the partial sums: float32, or float64 where x is
  void* stream;
};

#ifndef __CUDACC_RTC__  // host code

void partial_sums(const PartialSums&);

#endif  // __CUDACC_RTC__

}  // namespace inti::cuda
