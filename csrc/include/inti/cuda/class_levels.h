// The frame and the global level (Eq. 11 and 12) of the class tokens on CUDA: F_frame + F_global for each pair of
// frames, and back. The products of the frame level's two Linears are the caller's.
#pragma once

#include "inti/types.h"

namespace inti::cuda {

// "wide" is float for 16- and 32-bit dtypes, double for double. All memory is the device's; `stream` is a cudaStream_t.
struct ClassLevelsShape {
  int64_t batch, frames, dim;  // frames is even
  int64_t half;                // width of a frame's class token in the frame level
  DType x_dtype;               // of the class tokens: one of the same wide dtype
  DType dtype;                 // of every other tensor not said to be wide
};

constexpr int kGlobalParameters = 6;  // weight [dim, 3] and bias [dim] of three convolutions in time

// LayerNorm of the frame level's rows: of the class tokens [batch·frames, dim], or, where there is a preactivation, of
// its GELU, two frames side by side [batch·frames/2, 2·half].
struct ClassLevelsNormalize {
  ClassLevelsShape shape;
  const void* x;  // class tokens [batch, frames, dim], x_strides of batch and frame; x stands for x + position
  Strides x_strides;
  const void* position;       // wide [frames, dim], or null
  const void* preactivation;  // [batch, frames, half], or null
  const void* norm_weight;    // [columns]
  const void* norm_bias;      // [columns]
  double eps;
  void* normalized;  // [rows, columns]
  void* stream;
};

// GELU of the pairs' preactivation, and the global level added.
struct ClassLevelsContext {
  ClassLevelsShape shape;
  const void* x;
  Strides x_strides;
  const void* position;
  const void* pair_preactivation;               // [batch, frames/2, dim]; null: no frame level
  const void* convolutions[kGlobalParameters];  // nulls: no global level
  void* workspace;                              // wide, class_levels_workspace() numbers
  void* context;                                // wide [batch, frames/2, dim]
  void* stream;
};

// The backward: the context's, then the norms' of the pairs and of the frames, between them the caller's products, and
// the sums over rows that are left.
struct ClassLevelsBackwardContext {
  ClassLevelsShape shape;
  const void* x;
  Strides x_strides;
  const void* position;
  const void* pair_preactivation;
  const void* convolutions[kGlobalParameters];
  void* workspace;
  const void* grad_context;                    // wide [batch, frames/2, dim]
  void* grad_pair_preactivation;               // [batch, frames/2, dim], with the frame level
  void* grad_pair_bias;                        // [dim], with the frame level
  void* grad_x;                                // wide [batch, frames, dim], with the global level: its part
  void* grad_convolutions[kGlobalParameters];  // with the global level
  void* stream;
};

struct ClassLevelsBackwardNorm {
  ClassLevelsShape shape;
  const void* x;
  Strides x_strides;
  const void* position;
  const void* preactivation;  // as in ClassLevelsNormalize
  const void* norm_weight;
  const void* norm_bias;
  double eps;
  const void* grad_normalized;  // [rows, columns]
  void* normalized;             // [rows, columns], for the product that gives the weight's gradient
  void* statistics;             // wide [rows, 2]: mean and 1/√(variance + eps)
  void* grad_preactivation;     // [batch, frames, half], with a preactivation
  void* grad_x;                 // wide [batch, frames, dim], without one
  bool accumulate;              // grad_x is added to, not written
  void* stream;
};

struct ClassLevelsBackwardSums {
  ClassLevelsShape shape;
  const void* x;
  Strides x_strides;
  const void* position;
  const void* preactivation;
  const void* statistics[2];  // of the frames, of the pairs
  const void* grad_normalized[2];
  const void* grad_preactivation;
  void* grad_norm_weight[2];
  void* grad_norm_bias[2];
  void* grad_bias;  // [half], of the frames' Linear
  void* stream;
};

#ifndef __CUDACC_RTC__  // host code

int64_t class_levels_workspace(const ClassLevelsShape&);

void class_levels_normalize(const ClassLevelsNormalize&);
void class_levels_context(const ClassLevelsContext&);
void class_levels_backward_context(const ClassLevelsBackwardContext&);
void class_levels_backward_norm(const ClassLevelsBackwardNorm&);
void class_levels_backward_sums(const ClassLevelsBackwardSums&);

#endif  // __CUDACC_RTC__

}  // namespace inti::cuda
