// token_features' features once more, from what GELU was taken of: for a backward whose forward didn't keep them.
#pragma once

#include "gelu.h"
#include "token_features_backward.h"

namespace inti::cuda {

template <class T>
struct Activation {
  int tokens, width;
  TokenTiles cut;
  unsigned column_tiles;
  const T* preactivation;  // [frames, tokens, width]; frames of all clips
  T* features;             // [frames / 2, tokens, 2 · width]
};

// 128 threads, 8 blocks an SM (64 registers): 32 warps · 32 · 64 bytes = 64 KiB in flight. Fewer in float64, whose erf
// takes more registers.
template <class T, int V>
__global__ void __launch_bounds__(32 * kWarps, sizeof(T) == 8 ? 4 : 8)
    token_features_activation_kernel(const Activation<T> p) {
  const TileOfTokens tile(p.cut, p.tokens, p.column_tiles);
  const int column = (tile.columns * 32 + threadIdx.x % 32) * V;
  if (column >= p.width) return;
  const int64_t row = static_cast<int64_t>(tile.frame) * p.tokens + tile.first;
  const int64_t pair = static_cast<int64_t>(tile.frame / 2) * p.tokens + tile.first;
  const T* preactivation = p.preactivation + row * p.width + column;
  T* features = p.features + (2 * pair + tile.frame % 2) * p.width + column;
  for (int first = threadIdx.x / 32; first < tile.count; first += kWarps * kInFlight) {
    Loaded<T, V> runs[kInFlight];  // [V] of each token
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t token = first + i * kWarps;
      if (token >= tile.count) break;
      runs[i] = start_load<V>(preactivation + token * p.width);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t token = first + i * kWarps;
      if (token >= tile.count) break;
      auto run = widen(runs[i].numbers());
#pragma unroll
      for (int k = 0; k < V; ++k) run[k] = gelu(run[k]);
      store(features + token * 2 * p.width, narrow<T>(run));
    }
  }
}

}  // namespace inti::cuda
