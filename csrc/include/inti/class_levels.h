// The frame and the global level (Eq. 11 and 12) of the class tokens: F_frame + F_global for each pair of frames, and
// back.
#pragma once

#include "inti/types.h"

namespace inti {

struct ClassLevelsShape {
  int64_t batch, frames, dim;  // frames is even
  int64_t half;                // width of a frame's class token in the frame level
  DType x_dtype;
  DType dtype;  // of all other tensors, what x_dtype is computed in: float32 or float64
  int threads;
};

constexpr int kFrameParameters = 8, kGlobalConvolutions = 3, kGlobalParameters = 2 * kGlobalConvolutions;

struct ClassLevels {
  ClassLevelsShape shape;
  const void* x;         // class tokens [batch, frames, dim]
  Strides x_strides;     // of batch and frame
  const void* position;  // σ·P [frames, dim], or null
  // LayerNorm's weight and bias [dim], Linear's [half, dim] and [half]; of a pair [2·half], [dim, 2·half] and [dim].
  const void* frame[kFrameParameters];          // nulls: no frame level
  const void* convolutions[kGlobalParameters];  // weight [dim, 3] and bias [dim] of each; nulls: no global level
  double eps[2];                                // of a frame's LayerNorm and of a pair's
  void* workspace;                              // class_levels_workspace() numbers
};

struct ClassLevelsForward {
  ClassLevels levels;
  // For the backward, with the frame level: what its GELUs were taken of.
  void* frame_preactivation;  // [batch, frames, half]
  void* pair_preactivation;   // [batch, frames/2, dim]
  void* context;              // [batch, frames/2, dim]
};

struct ClassLevelsBackward {
  ClassLevels levels;
  const void* frame_preactivation;
  const void* pair_preactivation;
  const void* grad_context;  // [batch, frames/2, dim]
  void* grad_x;              // [batch, frames, dim]
  void* grad_frame[kFrameParameters];
  void* grad_convolutions[kGlobalParameters];
};

// Vectors of one thread in the global level: the clip before and behind each convolution, and two gradients of it. A
// pooling leaves no more than half of the frames and one.
inline int64_t global_level_vectors(int64_t frames) { return 6 * frames + 8; }

// Places in the workspace, in numbers.
struct ClassLevelsWorkspace {
  int64_t x, statistics, normalized, halves, grad_preactivation, grad_normalized, grad_halves, clips, size;

  ClassLevelsWorkspace(int64_t batch, int64_t frames, int64_t dim, int64_t half, int threads) {
    const int64_t rows = batch * frames, of_halves = rows * half, widest = rows * (dim > half ? dim : half);
    x = 0;
    statistics = x + rows * dim;
    normalized = statistics + 2 * rows;
    halves = normalized + widest;
    grad_preactivation = halves + of_halves;
    grad_normalized = grad_preactivation + widest;
    grad_halves = grad_normalized + widest;
    clips = grad_halves + of_halves;
    size = clips + threads * global_level_vectors(frames) * 16;  // numbers of the longest vector
  }
};

inline int64_t class_levels_workspace(int64_t batch, int64_t frames, int64_t dim, int64_t half, int threads) {
  return ClassLevelsWorkspace(batch, frames, dim, half, threads).size;
}

}  // namespace inti
