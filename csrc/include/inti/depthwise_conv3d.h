// depthwise_conv3d: depthwise convolution over the patch tokens seen as [frames, height, width], zero padding.
#pragma once

#include "inti/types.h"

namespace inti {

// "wide" is float for 16- and 32-bit x, double for double.
struct DepthwiseConv3dShape {
  int64_t batch, frames, prefix, height, width, dim;
  int64_t temporal_stride;  // divides frames
  int kernel_space;         // 3 (3×3×3) or 1 (3×1×1); along time the kernel is always 3
  DType dtype;              // of x and its gradient
  DType result;             // of y and its gradient: x's, or 16 bits where x has 32
  int threads;
};

struct DepthwiseConv3dForward {
  DepthwiseConv3dShape shape;
  const void* x;  // [batch, frames, prefix + height·width, dim], x_strides
  Strides x_strides;
  const void* weight;    // wide [3·kernel_space², dim]: taps in the order (t, h, w)
  const void* bias;      // wide [dim], or null
  const void* position;  // wide [frames, dim], or null: added to x inside the grid
  void* y;               // [batch, frames/temporal_stride, prefix + height·width, dim]; prefix tokens become 0
};

struct DepthwiseConv3dBackward {
  DepthwiseConv3dShape shape;
  const void* x;
  Strides x_strides;
  const void* weight;
  const void* position;
  const void* grad_y;  // [batch, frames/temporal_stride, prefix + height·width, dim], grad_y_strides
  Strides grad_y_strides;
  void* grad_x;             // [batch, frames, prefix + height·width, dim] contiguous, or null
  bool accumulate;          // grad_x is added to, not written
  void* grad_position;      // wide [frames, dim], or null
  void* position_partials;  // wide [batch, frames, dim]; null without grad_position
  void* grad_weight;        // wide [3·kernel_space² + 1, dim], the last row being the bias's, or null
  void* weight_partials;    // wide [depthwise_conv3d_chunks(...), 3·kernel_space² + 1, dim]; null without grad_weight
};

// Chunks of output frames in which grad_weight is summed: depends on the size only, so that the bits don't depend on
// threads. 32 chunks times the channel blocks occupy any CPU, and bound the partial sums' memory at large batches.
inline int64_t depthwise_conv3d_chunks(int64_t batch, int64_t out_frames) {
  return batch * out_frames < 32 ? batch * out_frames : 32;
}

}  // namespace inti
