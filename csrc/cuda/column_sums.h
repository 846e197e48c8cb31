// Sums over a tile's rows: a lane has V columns, the warps of a block share the rows, and their sums meet in shared
// memory in a fixed order.
#pragma once

#include "inti/device.h"

namespace inti::cuda {

// Sums are exchanged 16 bytes at a time at most, the same bytes of all lanes side by side: no bank conflicts.
template <class W, int V>
constexpr int kExchanged = V * sizeof(W) > 16 ? 16 / sizeof(W) : V;

template <class W, int V, int SUMS, int WARPS>
constexpr int kColumnSumBytes = WARPS * SUMS * V * 32 * static_cast<int>(sizeof(W));

// to(s, column, Σ over warps of sums[s] from this column on) for each group of columns, counted from the block's first.
// All threads take part. `shared` must not be in use by anyone when the first thread comes here.
template <int WARPS, class W, int V, int SUMS, class Store>
__device__ __forceinline__ void sum_over_warps(Shared<W> shared, const Vec<W, V> (&sums)[SUMS], Store to) {
  constexpr int G = kExchanged<W, V>, kGroups = SUMS * (V / G);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    Vec<W, G> part;
#pragma unroll
    for (int k = 0; k < G; ++k) part[k] = sums[group / (V / G)][group % (V / G) * G + k];
    store(shared + ((warp * kGroups + group) * 32 + lane) * G, part);
  }
  __syncthreads();
  for (int group = warp; group < kGroups; group += WARPS) {
    Vec<W, G> total{};
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const auto part = load<G>(shared + ((w * kGroups + group) * 32 + lane) * G);
#pragma unroll
      for (int k = 0; k < G; ++k) total[k] += part[k];
    }
    to(group / (V / G), lane * V + group % (V / G) * G, total);
  }
}

}  // namespace inti::cuda
