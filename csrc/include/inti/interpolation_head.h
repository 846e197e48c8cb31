// interpolation_head: Linear over [features ; cube + frame_context] → GELU → difference of two logits → interpolation;
// and back. These are the passes behind the first Linear's matrix products, which are PyTorch's; and forward with the
// product, where that is faster.
#pragma once

#include "inti/product.h"
#include "inti/token_blocks.h"

namespace inti {

// "wide" is float for 16- and 32-bit numbers, double for double; one of them is double only if all are.
struct InterpolationHeadShape {
  int64_t batch, frames, tokens, dim, hidden;  // frames is even
  int64_t first, count;                        // the pairs of frames that a call takes, over all clips
  DType dtype;                                 // of x, z and their gradients
  DType network;                               // of the weights and what the GELU is taken of
  DType product;                               // of the products' operands and results: network, or its wide dtype
  int threads;
};

struct InterpolationHeadForward {
  InterpolationHeadShape shape;
  const void* product;       // product [count · tokens, hidden]: the first Linear less what frame_bias has
  const void* frame_bias;    // wide [batch · frames/2, hidden]: its bias and what the frames' context adds
  int64_t frame_bias_pitch;  // from a pair of frames to the next; 0 where all have the same
  const void* weight2;       // wide [hidden]: the second Linear's first row less its second
  double bias2;              // likewise
  const void* x;             // [batch, frames, tokens, dim], x_strides
  Strides x_strides;
  const void* position;  // wide [frames, dim], or null
  void* preactivation;   // network [batch, frames/2, tokens, hidden], or null; may be where `product` is
  void* z;               // [batch, frames/2, tokens, dim]
  void* weights;         // network [batch, frames/2, tokens, 2]
  void* difference;      // wide [batch, frames/2, tokens]: of the logits
};

// With the first Linear's product, in one pass. The network's numbers are float32 or narrower.
struct InterpolationHeadNetwork {
  InterpolationHeadForward pass;  // of all pairs, without `product`; without weight2 only the preactivation is written
  const void* features;           // network [batch, frames/2, tokens, width]
  const void* cube;               // network [batch, frames/2, tokens, context], or null
  int64_t width, context;         // context is 0 without a cube
  const float* weight1;           // [hidden, width + context], rows weight1_pitch apart
  int64_t weight1_pitch;
  float* workspace;  // network_workspace(hidden, width + context, rows, threads) numbers
};

// The matrix is packed in two parts, one after the other: whole it would be the largest tensor that a forward holds.
// The rows carry the sums of the first part in a few numbers each.
constexpr int64_t kNumbersOfRow = 16;

inline int64_t network_columns(int64_t hidden) {
  return ((hidden + 1) / 2 + kColumnsOfTiles - 1) / kColumnsOfTiles * kColumnsOfTiles;
}

inline int64_t network_workspace(int64_t hidden, int64_t depth, int64_t rows, int threads) {
  return gemm_workspace(network_columns(hidden), depth, threads) + rows * kNumbersOfRow;
}

struct InterpolationHeadBackward {
  InterpolationHeadShape shape;
  const void* x;
  Strides x_strides;
  const void* position;
  const void* difference;
  const void* grad_z;  // [batch, frames/2, tokens, dim], grad_z_strides
  Strides grad_z_strides;
  const void* grad_weights;   // network [batch, frames/2, tokens, 2]
  const void* preactivation;  // or null without grad_hidden
  const void* weight2;
  void* grad_x;             // [batch, frames, tokens, dim] contiguous, or null
  bool accumulate;          // grad_x is added to, not written
  void* position_partials;  // wide [batch · frames/2 · token_blocks(tokens), 2, dim], or null
  void* grad_difference;    // wide [batch, frames/2, tokens]
  void* grad_hidden;        // product [count · tokens, hidden]: of what the GELU was taken of; or null
  void* hidden_partials;    // wide [batch · frames/2 · token_blocks(tokens), 2, hidden]: sums of grad_hidden and of
                            // grad_difference · GELU, which is weight2's gradient; or null
};

}  // namespace inti
