// pair_interpolate on CUDA: z[j,k] = α·x[2j,k] + β·x[2j+1,k], (α, β) = softmax(logits[j,k]); x stands for x + position.
#pragma once

#include "inti/types.h"

namespace inti::cuda {

// "wide" is float for 16- and 32-bit x, double for double. All memory is the device's; `stream` is a cudaStream_t.
struct PairInterpolateShape {
  int64_t batch, frames, tokens, dim;  // frames is even
  DType dtype;                         // of x, z and their gradients
  DType logits_dtype;                  // of logits, weights and their gradients
};

struct PairInterpolateForward {
  PairInterpolateShape shape;
  const void* x;  // [batch, frames, tokens, dim], x_strides
  Strides x_strides;
  const void* logits;    // [batch, frames/2, tokens, 2]
  const void* position;  // wide [frames, dim], or null
  void* z;               // [batch, frames/2, tokens, dim]
  void* weights;         // [batch, frames/2, tokens, 2]
  void* stream;
};

struct PairInterpolateBackward {
  PairInterpolateShape shape;
  const void* x;
  Strides x_strides;
  const void* logits;
  const void* position;
  const void* grad_z;  // [batch, frames/2, tokens, dim], grad_z_strides
  Strides grad_z_strides;
  const void* grad_weights;  // [batch, frames/2, tokens, 2]
  void* grad_x;              // [batch, frames, tokens, dim] contiguous, or null
  bool accumulate;           // grad_x is added to, not written
  void* grad_logits;         // [batch, frames/2, tokens, 2], or null
  void* grad_position;       // wide [frames, dim], or null
  void* partials;            // wide [batch, pair_interpolate_tiles(...), frames, dim], or null
  void* stream;
};

#ifndef __CUDACC_RTC__  // host code

// Tiles of tokens in which the backward sums grad_position: 16 tokens each, or fewer where that would leave some of
// V100's 80 multiprocessors without two blocks. Depends on the sizes only, so that the bits do too.
inline int64_t pair_interpolate_tiles(int64_t batch, int64_t frames, int64_t tokens) {
  const int64_t pairs = batch * (frames / 2), least = pairs ? (160 + pairs - 1) / pairs : 1,
                wanted = (tokens + 15) / 16;
  return wanted < least ? (least < tokens ? least : tokens) : wanted;
}

void pair_interpolate_forward(const PairInterpolateForward&);
void pair_interpolate_backward(const PairInterpolateBackward&);

#endif  // __CUDACC_RTC__

}  // namespace inti::cuda
