// The global level (Eq. 12) of class tokens, and back: depthwise convolution in time → max pooling → GELU, twice; a
// third convolution, the mean over what is left of the frames, GELU.
#pragma once

#include "inti/types.h"

namespace inti {

struct GlobalLevelShape {
  int64_t batch, frames, dim;  // frames is even
  DType dtype;                 // of all tensors: float32 or float64
  int threads;
};

constexpr int kGlobalConvolutions = 3;

struct GlobalLevelForward {
  GlobalLevelShape shape;
  const void* x;                             // [batch, frames, dim]
  const void* weights[kGlobalConvolutions];  // [dim, 3]
  const void* biases[kGlobalConvolutions];   // [dim]
  void* context;                             // [batch, frames/2, dim]: F_global for each pair of frames
  bool accumulate;                           // context is added to, not written
  void* workspace;                           // global_level_workspace(frames, threads) numbers
};

struct GlobalLevelBackward {
  GlobalLevelShape shape;
  const void* x;
  const void* weights[kGlobalConvolutions];
  const void* biases[kGlobalConvolutions];
  const void* grad_context;  // [batch, frames/2, dim]
  void* grad_x;              // [batch, frames, dim]
  bool accumulate;           // grad_x is added to, not written
  void* grad_weights[kGlobalConvolutions];
  void* grad_biases[kGlobalConvolutions];
  void* workspace;
};

// Vectors of one thread: the clip before and behind each convolution, and two gradients of it. A pooling leaves no more
// than half of the frames and one.
inline int64_t global_level_vectors(int64_t frames) { return 6 * frames + 8; }

inline int64_t global_level_workspace(int64_t frames, int threads) {
  return threads * global_level_vectors(frames) * 16;  // numbers of the longest vector
}

}  // namespace inti
