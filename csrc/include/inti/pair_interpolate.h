// pair_interpolate: z[j,k] = α·x[2j,k] + β·x[2j+1,k], (α, β) = softmax(logits[j,k]); x stands for x + position.
#pragma once

#include "inti/types.h"

namespace inti {

// Shared by both directions. "wide" is float for 16- and 32-bit x, double for double.
struct PairInterpolateShape {
  int64_t batch, frames, tokens, dim;  // frames is even
  DType dtype;                         // of x, z and their gradients
  int threads;
};

struct PairInterpolateForward {
  PairInterpolateShape shape;
  const void* x;  // [batch, frames, tokens, dim], x_strides
  Strides x_strides;
  const double* logits;  // [batch, frames/2, tokens, 2]
  const void* position;  // wide [frames, dim], or null
  void* z;               // [batch, frames/2, tokens, dim]
  double* weights;       // [batch, frames/2, tokens, 2]
};

struct PairInterpolateBackward {
  PairInterpolateShape shape;
  const void* x;
  Strides x_strides;
  const double* logits;
  const void* position;
  const void* grad_z;  // [batch, frames/2, tokens, dim], grad_z_strides
  Strides grad_z_strides;
  const double* grad_weights;  // [batch, frames/2, tokens, 2]
  void* grad_x;                // [batch, frames, tokens, dim] contiguous, or null
  bool accumulate;             // grad_x is added to, not written
  double* grad_logits;         // [batch, frames/2, tokens, 2], or null
  void* grad_position;         // wide [frames, dim], or null
  void* partials;              // wide [batch, pair_interpolate_chunks(tokens), frames, dim]; null without grad_position
};

// Chunks of tokens in which grad_position is summed: depends on the size only, so that the bits don't depend on
// threads.
inline int64_t pair_interpolate_chunks(int64_t tokens) { return (tokens + 31) / 32; }

}  // namespace inti
