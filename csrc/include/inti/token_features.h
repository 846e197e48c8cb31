// token_features: LayerNorm → Linear → GELU of every token, written as concatenated pairs; and back. These are the
// passes before and after the Linear's matrix products, which are PyTorch's; and all in one, where that is faster.
#pragma once

#include "inti/token_blocks.h"

namespace inti {

// "wide" is float for 16- and 32-bit numbers, double for double; one of them is double only if all are.
struct TokenFeaturesShape {
  int64_t batch, frames, tokens, dim, width;  // frames is even; width is the Linear's
  int64_t first, count;                       // the frames that a call takes, over all clips; both even
  DType dtype;                                // of x and its gradient
  DType network;                              // of the features and what the GELU is taken of
  DType product;                              // of the products' operands and results: network, or its wide dtype
  int threads;
};

// (x + position - mean) / σ · norm_weight + norm_bias.
struct TokenFeaturesNormalize {
  TokenFeaturesShape shape;
  const void* x;  // [batch, frames, tokens, dim], x_strides
  Strides x_strides;
  const void* position;     // wide [frames, dim], or null
  const void* norm_weight;  // wide [dim]
  const void* norm_bias;    // wide [dim]
  double eps;
  void* statistics;      // wide [batch, frames, tokens, 2]: mean and 1/σ
  bool have_statistics;  // they are read, not written
  void* normalized;      // product [count · tokens, dim]
};

struct TokenFeaturesActivation {
  TokenFeaturesShape shape;
  const void* product;  // product [count · tokens, width]
  const void* bias;     // wide [width], or null
  void* features;       // network [batch, frames/2, tokens, 2 · width]
  void* preactivation;  // network [batch, frames, tokens, width], or null; may be where `product` is
};

// Both with the Linear between them, in one pass. The network's numbers are float32 or narrower.
struct TokenFeaturesForward {
  TokenFeaturesNormalize norm;         // of all frames; without `normalized`
  TokenFeaturesActivation activation;  // of all frames; without `product`
  const float* weight;                 // [width, dim]
  float* workspace;                    // gemm_workspace(width, dim, threads) numbers
};

// grad_preactivation = grad_features · GELU'(preactivation).
struct TokenFeaturesActivationBackward {
  TokenFeaturesShape shape;
  const void* grad_features;  // network [batch · frames/2 · tokens, 2 · width], rows grad_features_pitch apart
  int64_t grad_features_pitch;
  const void* preactivation;
  void* grad_preactivation;  // product [count · tokens, width]
  void* partials;            // wide [batch · frames · token_blocks(tokens), width]: of the bias; or null
};

struct TokenFeaturesNormBackward {
  TokenFeaturesShape shape;
  const void* x;
  Strides x_strides;
  const void* position;
  const void* norm_weight;
  const void* statistics;
  const void* grad_normalized;  // product [count · tokens, dim]
  void* grad_x;                 // [batch, frames, tokens, dim] contiguous, or null
  bool accumulate;              // grad_x is added to, not written
  void* partials;  // wide [batch · frames · token_blocks(tokens), 3, dim]: of norm_weight, norm_bias, position; or null
};

}  // namespace inti
