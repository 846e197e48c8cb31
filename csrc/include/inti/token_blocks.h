// How the work of token_features and interpolation_head is cut, and how partial sums become gradients.
#pragma once

#include "inti/types.h"

namespace inti {

// Tokens of one frame (or pair of frames) that are one task and one partial sum: a matter of the size only, so that the
// bits don't depend on threads.
constexpr int64_t kTokensOfBlock = 32;
inline int64_t token_blocks(int64_t tokens) { return (tokens + kTokensOfBlock - 1) / kTokensOfBlock; }

// sums[i] = Σ over terms of partials[i], in order.
struct PartialSums {
  int64_t count, terms, columns;
  DType dtype;           // float32 or float64
  const void* partials;  // [count, terms, columns]
  void* sums;            // [count, columns]
  int threads;
};

}  // namespace inti
