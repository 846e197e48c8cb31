// [LayerNorm →] Linear [→ GELU] of a few rows, and back: the frame level's two layers, and what the frames' context
// adds to the head's first Linear. A matrix product of a few rows is limited by reading the weight, once.
#pragma once

#include "inti/types.h"

namespace inti {

struct FewRowsShape {
  int64_t rows, in, out;
  DType weight_dtype;  // what that is computed in, float32 or float64, all other tensors are of
  int threads;
};

struct FewRowsForward {
  FewRowsShape shape;
  const void* x;            // [rows, in]
  const void* norm_weight;  // [in], or null: no LayerNorm
  const void* norm_bias;    // [in]
  double eps;
  void* statistics;    // workspace [rows, 2], with a LayerNorm: mean and 1/σ
  void* normalized;    // workspace [rows, in], with a LayerNorm
  const void* weight;  // [out, in], rows weight_pitch apart
  int64_t weight_pitch;
  const void* bias;     // [out]
  void* preactivation;  // [rows, out]
  void* y;              // [rows, out], or null: no GELU
};

struct FewRowsBackward {
  FewRowsShape shape;
  const void* grad_y;  // [rows, out], rows grad_y_pitch apart
  int64_t grad_y_pitch;
  const void* preactivation;  // or null: no GELU
  const void* x;              // [rows, in]
  const void* norm_weight;    // or null: no LayerNorm
  const void* norm_bias;      // with a LayerNorm
  double eps;
  void* statistics;  // workspace [rows, 2], with a LayerNorm
  void* normalized;  // workspace [rows, in], with a LayerNorm
  const void* weight;
  int64_t weight_pitch;
  void* grad_x;            // [rows, in], or null without a LayerNorm
  void* grad_norm_weight;  // [in], with a LayerNorm
  void* grad_norm_bias;    // [in], with a LayerNorm
  void* grad_weight;       // [out, in], rows grad_weight_pitch apart, or null
  int64_t grad_weight_pitch;
  bool accumulate;           // grad_weight is added to, not written
  void* grad_bias;           // [out], or null
  void* grad_preactivation;  // workspace [out, rows]
  void* grad_normalized;     // workspace [rows, in], with a LayerNorm
};

}  // namespace inti
