// depthwise_conv3d on CUDA: depthwise convolution over the patch tokens seen as [frames, height, width], zero padding.
#pragma once

#include "inti/types.h"

namespace inti::cuda {

// "wide" is float for 16- and 32-bit x, double for double. All memory is the device's; `stream` is a cudaStream_t.
struct DepthwiseConv3dShape {
  int64_t batch, frames, prefix, height, width, dim;
  int64_t temporal_stride;  // divides frames
  int kernel_space;         // 3 (3×3×3) or 1 (3×1×1, with temporal_stride 1); along time the kernel is always 3
  DType dtype;              // of x, y and their gradients
  DType parameter_dtype;    // of weight, bias and their gradients
};

struct DepthwiseConv3dForward {
  DepthwiseConv3dShape shape;
  const void* x;  // [batch, frames, prefix + height·width, dim], x_strides
  Strides x_strides;
  const void* weight;    // [dim, 3, kernel_space, kernel_space]
  const void* bias;      // [dim], or null
  const void* position;  // wide [frames, dim], or null: added to x inside the grid
  void* y;               // [batch, frames/temporal_stride, prefix + height·width, dim]; prefix tokens become 0
  void* stream;
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
  void* position_partials;  // wide [batch · tiles, frames, dim], or null
  void* grad_weight;        // [dim, 3, kernel_space, kernel_space], or null
  void* grad_bias;          // [dim], or null
  void* weight_partials;    // wide [batch · runs · tiles, dim, 3·kernel_space² + 1], the bias's last; or null
  void* stream;
};

// How the work is cut: tiles of a frame's patches, and runs of consecutive frames that a block walks along. Depends on
// the sizes only, so that the bits do too. Callers size the partial sums by it.
struct DepthwiseConv3dTiling {
  int64_t tiles, runs;
};

#ifndef __CUDACC_RTC__  // host code

DepthwiseConv3dTiling depthwise_conv3d_tiling(const DepthwiseConv3dShape&);

void depthwise_conv3d_forward(const DepthwiseConv3dForward&);
void depthwise_conv3d_backward(const DepthwiseConv3dBackward&);

#endif  // __CUDACC_RTC__

}  // namespace inti::cuda
