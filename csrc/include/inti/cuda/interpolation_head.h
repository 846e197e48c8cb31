// interpolation_head on CUDA: Linear over [features ; cube + frame_context] → GELU → two logits → softmax →
// interpolation. Only the difference of the two logits matters, so it alone is computed.
#pragma once

#include "inti/types.h"

namespace inti::cuda {

// "wide" is float for 16- and 32-bit dtypes, double for double. All memory is the device's; `stream` is a cudaStream_t.
// Rows are the batch·frames/2·tokens token pairs in the order of features' axes.
struct InterpolationHeadShape {
  int64_t batch, frames, tokens, dim;  // of x; frames is even
  int64_t width;                       // D, of features
  int64_t context;                     // C', of cube and frame_context; 0 with neither
  int64_t hidden;                      // h
  DType dtype;                         // of every tensor not said to be wide or x's
  DType x_dtype;                       // of x, z and their gradients; double if and only if dtype is
};

struct InterpolationHeadForward {
  InterpolationHeadShape shape;
  const void* features;    // [rows, width]
  const void* cube;        // [rows, context], or null
  const void* frame_bias;  // wide [batch·frames/2, hidden]: W_context·frame_context of each frame, or null
  const void* x;           // [batch, frames, tokens, dim], x_strides; x stands for x + position
  Strides x_strides;
  const void* position;  // wide (by x_dtype) [frames, dim], or null
  const void* weight1;   // [hidden, width + context]
  const void* bias1;     // [hidden]
  const void* weight2;   // [2, hidden]
  const void* bias2;     // [2]
  void* partials;        // wide [interpolation_head_partials(...), rows]: workspace, partial differences of the logits
  void* difference;      // wide [rows]: first logit less second, written, for the backward
  void* preactivation;   // [rows, hidden]: what GELU was taken of, for the backward; or null
  void* z;               // [batch, frames/2, tokens, dim]
  void* weights;         // [batch, frames/2, tokens, 2], in dtype
  void* stream;
};

// The hidden layer's product alone: what the forward with preactivation leaves there, bit for bit.
struct InterpolationHeadPreactivation {
  InterpolationHeadShape shape;
  const void* features;
  const void* cube;
  const void* frame_bias;
  const void* weight1;
  const void* bias1;
  void* preactivation;  // [rows, hidden]
  void* stream;
};

// The backward before the products of the first Linear, which are the caller's (grad_preactivation · weight1 gives
// features' and cube's gradients, grad_preactivationᵀ · features, · cube and grad_frame_biasᵀ · frame_context
// weight1's).
struct InterpolationHeadBackward {
  InterpolationHeadShape shape;
  const void* x;
  Strides x_strides;
  const void* position;
  const void* difference;
  const void* grad_z;  // [batch, frames/2, tokens, dim], grad_z_strides
  Strides grad_z_strides;
  const void* grad_weights;   // [batch, frames/2, tokens, 2], in dtype
  const void* preactivation;  // [rows, hidden]; unused (null) without grad_preactivation
  const void* weight2;        // [2, hidden]
  void* grad_x;               // [batch, frames, tokens, dim] contiguous, or null
  bool accumulate;            // grad_x is added to, not written
  void* grad_position;        // wide (by x_dtype) [frames, dim], or null
  void* position_partials;    // as pair_interpolate's partials
  void* grad_difference;      // wide [rows], written
  void* grad_bias2;           // [2], or null: sums of grad_difference, and less itself
  void* grad_preactivation;   // [rows, hidden], or null: then none of the following is written
  void* grad_frame_bias;   // wide [batch·frames/2, hidden]: sums of grad_preactivation over a frame's tokens, or null
  void* grad_bias1;        // [hidden], or null
  void* frame_partials;    // wide [tiles, batch·frames/2, hidden]: of the two above; null without either
  void* grad_weight2;      // [2, hidden], or null
  void* weight2_partials;  // wide [tiles·batch·frames/2, hidden]: of its first row
  void* stream;
};

#ifndef __CUDACC_RTC__  // host code

// Column tiles of the hidden layer, each of which leaves one partial difference a row.
int64_t interpolation_head_partials(const InterpolationHeadShape&);
// tiles · batch · frames/2: tiles of tokens (of one pair of frames each) in which the backward sums over rows.
int64_t interpolation_head_tiles(const InterpolationHeadShape&);

void interpolation_head_forward(const InterpolationHeadForward&);
void interpolation_head_preactivation(const InterpolationHeadPreactivation&);
void interpolation_head_backward(const InterpolationHeadBackward&);

#endif  // __CUDACC_RTC__

}  // namespace inti::cuda
