// token_features on CUDA: LayerNorm → Linear(dim, width) → GELU of every token, written as concatenated pairs.
#pragma once

#include "inti/types.h"

namespace inti::cuda {

// "wide" is float for 16- and 32-bit dtypes, double for double. All memory is the device's; `stream` is a cudaStream_t.
// Rows are the batch·frames·tokens tokens in the order of x's axes.
struct TokenFeaturesShape {
  int64_t batch, frames, tokens, dim;  // frames is even
  int64_t width;                       // of the Linear's output
  DType dtype;                         // of every tensor not said to be wide
};

struct TokenFeaturesForward {
  TokenFeaturesShape shape;
  const void* x;  // [batch, frames, tokens, dim], x_strides; x stands for x + position
  Strides x_strides;
  const void* position;     // wide [frames, dim], or null
  const void* norm_weight;  // [dim]
  const void* norm_bias;    // [dim]
  const void* weight;       // [width, dim]
  const void* bias;         // [width]
  double eps;
  void* statistics;     // wide [rows, 2]: mean and 1/√(variance + eps), written
  void* features;       // [batch, frames/2, tokens, 2·width]
  void* preactivation;  // [rows, width]: what GELU was taken of, for the backward; or null
  void* stream;
};

// The backward is two entry points around the two products of the Linear, which are the caller's:
//   grad_normalized = grad_preactivation · weight,  grad_weight = grad_preactivationᵀ · normalized.
struct TokenFeaturesBackwardActivation {
  TokenFeaturesShape shape;
  const void* grad_features;    // [batch, frames/2, tokens, 2·width]: rows of 2·width, contiguous
  int64_t grad_features_pitch;  // from row to row
  const void* preactivation;    // [rows, width]
  void* grad_preactivation;     // [rows, width]
  void* grad_bias;              // [width], or null
  void* partials;               // wide [token_features_tiles(...), width], or null
  void* stream;
};

struct TokenFeaturesBackwardNorm {
  TokenFeaturesShape shape;
  const void* x;
  Strides x_strides;
  const void* position;
  const void* norm_weight;
  const void* norm_bias;
  const void* statistics;
  const void* grad_normalized;  // [rows, dim]
  void* grad_x;                 // [batch, frames, tokens, dim] contiguous, or null
  bool accumulate;              // grad_x is added to, not written
  void* total;              // wide [batch, frames, tokens, dim] contiguous, for 16-bit dtypes, or null: the gradient
                            // is added to it, and grad_x too if `accumulate` says so, which is left as it is
  void* grad_norm_weight;   // [dim], or null
  void* grad_norm_bias;     // [dim], or null
  void* grad_position;      // wide [frames, dim], or null
  void* norm_partials;      // wide [token_features_tiles(...), 2, dim]: the weight's, the bias's; or null
  void* position_partials;  // wide [token_features_tiles(...) / frames, frames, dim], or null
  void* stream;
};

// The LayerNorm's output, for the product that gives grad_weight.
struct TokenFeaturesNormalize {
  TokenFeaturesShape shape;
  const void* x;
  Strides x_strides;
  const void* position;
  const void* norm_weight;
  const void* norm_bias;
  const void* statistics;
  void* normalized;  // [rows, dim]
  void* stream;
};

// The features once more, from what the forward kept.
struct TokenFeaturesActivation {
  TokenFeaturesShape shape;
  const void* preactivation;  // [rows, width]
  void* features;             // [batch, frames/2, tokens, 2·width]
  void* stream;
};

#ifndef __CUDACC_RTC__  // host code

// Tiles of tokens (of one frame each) in which the backward sums parameters' gradients; batch-major, then frames.
int64_t token_features_tiles(const TokenFeaturesShape&);

void token_features_forward(const TokenFeaturesForward&);
void token_features_backward_activation(const TokenFeaturesBackwardActivation&);
void token_features_activation(const TokenFeaturesActivation&);
void token_features_normalize(const TokenFeaturesNormalize&);
void token_features_backward_norm(const TokenFeaturesBackwardNorm&);

#endif  // __CUDACC_RTC__

}  // namespace inti::cuda
