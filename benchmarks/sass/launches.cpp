// Prints how the CUDA kernels are launched: the sizes of their tiles, from the code that launches them. A line is a
// name and numbers. For sass_model.py, which compiles it by g++ against the emulator and runs it.
#include <cstdio>

#include "inti/cuda/pair_interpolate.h"

#include "depthwise_conv3d_tile.h"
#include "gemm.h"
#include "interpolate.h"
#include "token_features_backward.h"
#include "token_rows.h"

namespace inti::cuda {
namespace {

struct Size {
  int dim, side, batch, frames;
};

template <class T, int P, int SPACE>
void convolution(const Size& s, int stride) {
  const Tiling t = tile_frames<T>(s.batch, s.side, s.side, s.dim, s.frames / stride, P);
  const Layout<T, 16 / sizeof(T), P, SPACE> layout(t);
  std::printf("convolution_%zu_%d_%d_%d_%d_%d_%d_%d %d %d %d %d %d %d %d %d %d\n", sizeof(T), P, SPACE, stride, s.dim,
              s.side, s.batch, s.frames, t.rows, t.strips, t.tiles, t.slabs, t.run, t.runs, t.threads, layout.bytes,
              backward_bytes<T, 16 / sizeof(T), P, SPACE, true>(t));
}

template <class Tile>
void product(const char* name) {
  std::printf("product_%s %d %d %d %d %d\n", name, Tile::kRows, Tile::kColumns, Tile::kDepth, Tile::kThreads,
              Tile::kSharedBytes);
}

template <class T>
void norm() {
  std::printf("norm_%zu %d %d %d\n", sizeof(T), kNormWarps, kNormTermBytes<T>, kNormColumnBytes<T>);
}

void of_size(const Size& s) {
  std::printf("pair_tiles_%d_%d_%d_%d %d\n", s.dim, s.side, s.batch, s.frames,
              static_cast<int>(pair_interpolate_tiles(s.batch, s.frames, 1 + s.side * s.side)));
  for (const int frames : {s.batch * s.frames, s.batch * s.frames / 2}) {
    const TokenTiles cut = token_tiles(frames, 1 + s.side * s.side);
    std::printf("token_tiles_%d_%d %u %u\n", frames, s.side, cut.tiles, cut.tile_tokens);
  }
  for (const int stride : {2, 1}) {
    convolution<float16, 7, 3>(s, stride);
    convolution<float16, 8, 3>(s, stride);
    convolution<float, 8, 3>(s, stride);
  }
  convolution<float16, 8, 1>(s, 1);
  convolution<float, 8, 1>(s, 1);
}

}  // namespace
}  // namespace inti::cuda

// dim, side, batch and frames of each size.
int main(int count, char** arguments) {
  using namespace inti::cuda;
  std::printf("pair %d %d %d\n", kInterpolateWarps, kForwardTokens, kBackwardTokens);
  product<WmmaTile>("float16");
  product<FmaTile<float>>("float32");
  std::printf("slab %d %d %d\n", kLanes, kSlab<inti::float16>, kSlab<float>);
  norm<inti::float16>();
  norm<float>();
  for (int i = 1; i + 3 < count; i += 4) {
    of_size({std::atoi(arguments[i]), std::atoi(arguments[i + 1]), std::atoi(arguments[i + 2]),
             std::atoi(arguments[i + 3])});
  }
}
