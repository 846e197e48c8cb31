// depthwise_conv3d on the CPU.
//
// A task is one frame and one block of channels. A row of the grid, of each frame that its taps read, is staged in a
// small buffer of wide numbers: there the conversion from 16 bits, σP and the zero padding are paid once an element,
// not once a tap, and the inner loops know neither dtype nor border. What is staged goes at once into all output rows
// that it is read for, so that no more than these and the staged rows need to stay in L1. The gradient of x is the same
// loop with the taps turned round.
#include "inti/depthwise_conv3d.h"

#include "grid_rows.h"
#include "parallel.h"

namespace inti::INTI_ISA {
namespace {

constexpr int kKernelTime = 3;

// One frame that an output frame reads, and the tap along time that it is read through.
struct FrameTap {
  int64_t frame;
  int tap;
};

struct FrameTaps {
  FrameTap at[kKernelTime];
  int count;
};

// y[frame] reads x[stride·frame + tap − 1].
FrameTaps frames_read(const DepthwiseConv3dShape& shape, int64_t out_frame) {
  FrameTaps taps{};
  for (int tap = 0; tap < kKernelTime; ++tap) {
    const int64_t frame = shape.temporal_stride * out_frame + tap - 1;
    if (frame >= 0 && frame < shape.frames) taps.at[taps.count++] = {frame, tap};
  }
  return taps;
}

// grad_x[frame] reads the gradients of the outputs that read x[frame].
FrameTaps gradients_read(const DepthwiseConv3dShape& shape, int64_t frame) {
  FrameTaps taps{};
  for (int tap = 0; tap < kKernelTime; ++tap) {
    const int64_t scaled = frame + 1 - tap;
    if (scaled >= 0 && scaled % shape.temporal_stride == 0 &&
        scaled / shape.temporal_stride < shape.frames / shape.temporal_stride)
      taps.at[taps.count++] = {scaled / shape.temporal_stride, tap};
  }
  return taps;
}

// The weights of one block of channels, zero behind the last channel.
template <class A, int K>
struct alignas(64) Weights {
  A at[kKernelTime][K][K][kChannels<A>];

  // The gradient of x sees the taps of a row and a column from the other end.
  Weights(const void* weight, int64_t dim, const Tile& tile, bool turned) {
    const A* from = static_cast<const A*>(weight) + tile.channel;
    for (int t = 0; t < kKernelTime; ++t)
      for (int h = 0; h < K; ++h)
        for (int w = 0; w < K; ++w) {
          A* to = turned ? at[t][K - 1 - h][K - 1 - w] : at[t][h][w];
          for (int c = 0; c < kChannels<A>; ++c) to[c] = c < tile.channels ? from[c] : A(0);
          from += dim;
        }
  }
};

// Output rows that a staged vector goes into at once, and columns of each: as many sums as there are registers for,
// beside the weights.
template <class A>
constexpr int kRowsAtOnce = sizeof(Vec<A>) == 64 ? 3 : 1;
template <class A>
constexpr int kColumnsAtOnce = sizeof(Vec<A>) == 64 ? 7 : 8;

// Adds the staged rows, one of each frame, to columns [first, first + N) and one vector of channels of output rows
// outs[h], h in [begin, begin + R), which they are read for through row h of the taps. The first time that a row is
// added to, it starts as the bias.
template <int N, int R, int K, class A>
INTI_INLINE void add_columns(const Row<A>* rows, const FrameTaps& taps, const Weights<A, K>& weights, int begin,
                             int first, int c, int started, Vec<A> bias, Row<A>* const* outs) {
  Vec<A> sums[R][N];
#pragma GCC unroll 3
  for (int j = 0; j < R; ++j)
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) sums[j][i] = begin + j < started ? bias : load(&outs[begin + j]->at[first + i][c]);
  for (int f = 0; f < taps.count; ++f) {
    const A(*row)[kChannels<A>] = rows[f].at + first;
    const auto& of_frame = weights.at[taps.at[f].tap];
    Vec<A> taps_of_row[R][K];
#pragma GCC unroll 3
    for (int j = 0; j < R; ++j)
#pragma GCC unroll 3
      for (int w = 0; w < K; ++w) taps_of_row[j][w] = load(&of_frame[begin + j][w][c]);
#pragma GCC unroll 10
    for (int column = 0; column < N + K - 1; ++column) {
      const Vec<A> v = load(&row[column][c]);
#pragma GCC unroll 3
      for (int j = 0; j < R; ++j)
#pragma GCC unroll 3
        for (int w = 0; w < K; ++w)
          if (column - w >= 0 && column - w < N) sums[j][column - w] += taps_of_row[j][w] * v;
    }
  }
#pragma GCC unroll 3
  for (int j = 0; j < R; ++j)
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) store(&outs[begin + j]->at[first + i][c], sums[j][i]);
}

// The same of `count` columns, at most N.
template <int N, int R, int K, class A, class... Args>
INTI_INLINE void add_some_columns(int count, const Args&... args) {
  if constexpr (N > 1)
    if (count < N) return add_some_columns<N - 1, R, K, A>(count, args...);
  add_columns<N, R, K, A>(args...);
}

template <int K, class A>
INTI_INLINE void add_rows(const Row<A>* rows, const FrameTaps& taps, const Weights<A, K>& weights, const Tile& tile,
                          int started, const A* bias, Row<A>* const* outs) {
  constexpr int most = kColumnsAtOnce<A>, at_once = kRowsAtOnce<A> < K ? kRowsAtOnce<A> : K;
  const int parts = (tile.columns + most - 1) / most;
  for (int c = 0; c < tile.channels; c += kLanes<A>)
    for (int part = 0; part < parts; ++part) {
      const int first = tile.columns * part / parts, count = tile.columns * (part + 1) / parts - first;
      for (int h = 0; h < K; h += at_once)
        add_some_columns<most, at_once, K, A>(count, rows, taps, weights, h, first, c, started, load(bias + c), outs);
    }
}

// Convolves one frame tile by tile and hands every finished row to finish(r, tile, row).
template <class T, int K, class A, class Finish>
void convolve_frame(const Source& source, int64_t batch, const FrameTaps& taps, const Weights<A, K>& weights, Tile tile,
                    const A* bias, const Finish& finish) {
  constexpr int halo = K / 2, width = kColumns - 2 * halo;
  Row<A> rows[kKernelTime], slots[K];  // output row r lies in slot r mod K
  for (tile.column = 0; tile.column < source.width; tile.column += width) {
    tile.columns = int(source.width - tile.column < width ? source.width - tile.column : width);
    for (int64_t r = 0; r < source.height; ++r) {
      for (int f = 0; f < taps.count; ++f) stage_row<T>(source, batch, taps.at[f].frame, r, tile, halo, rows[f]);
      // Row h of the taps leads to output row r − h + halo. What comes to lie outside of the grid is never handed on.
      Row<A>* outs[K];
      for (int h = 0; h < K; ++h) outs[h] = &slots[(r - h + halo + K) % K];
      add_rows<K>(rows, taps, weights, tile, r == 0 ? K : 1, bias, outs);
      if (r >= halo) finish(r - halo, tile, *outs[K - 1]);
      if (halo && r + 1 == source.height) finish(r, tile, *outs[halo]);
    }
  }
}

template <class T, class A>
INTI_INLINE void store_token(T* to, const A* from, int channels, bool accumulate) {
  constexpr int lanes = kLanes<A>;
  int c = 0;
  for (; c + lanes <= channels; c += lanes) {
    const Vec<A> v = load(from + c);
    store(to + c, accumulate ? load(to + c) + v : v);
  }
  if (const int rest = channels - c; rest > 0) {
    const Vec<A> v = load(from + c);
    store_first(to + c, accumulate ? load_first(to + c, rest) + v : v, rest);
  }
}

// Frames × blocks of channels, the blocks of a frame one after the other.
template <class A, class Task>
void for_each_frame_block(const DepthwiseConv3dShape& shape, int64_t frames, const Task& task) {
  const int64_t blocks = (shape.dim + kChannels<A> - 1) / kChannels<A>;
  parallel_for(shape.batch * frames * blocks, shape.threads, [&](int64_t i) {
    task(i / blocks / frames, i / blocks % frames, channel_tile(shape.dim, i % blocks, kChannels<A>));
  });
}

template <class T>
void clear_prefix(T* frame, const DepthwiseConv3dShape& shape, const Tile& tile) {
  for (int64_t k = 0; k < shape.prefix; ++k)
    for (int c = 0; c < tile.channels; ++c) frame[k * shape.dim + tile.channel + c] = T{};
}

template <class T, class Y, int K>
void forward(const DepthwiseConv3dForward& p) {
  using A = wide_t<T>;
  const DepthwiseConv3dShape& s = p.shape;
  const Source source(s, p.x, p.x_strides, p.position);
  const int64_t out_frames = s.frames / s.temporal_stride, tokens = s.prefix + s.height * s.width;
  for_each_frame_block<A>(s, out_frames, [&](int64_t batch, int64_t frame, const Tile& block) {
    const Weights<A, K> weights(p.weight, s.dim, block, false);
    alignas(64) A bias[kChannels<A>] = {};
    if (p.bias)
      for (int c = 0; c < block.channels; ++c) bias[c] = static_cast<const A*>(p.bias)[block.channel + c];
    Y* y = static_cast<Y*>(p.y) + (batch * out_frames + frame) * tokens * s.dim;
    clear_prefix(y, s, block);
    convolve_frame<T>(source, batch, frames_read(s, frame), weights, block, bias,
                      [&](int64_t r, const Tile& tile, const Row<A>& row) {
                        Y* to = y + (s.prefix + r * s.width + tile.column) * s.dim + tile.channel;
                        for (int i = 0; i < tile.columns; ++i)
                          store_token(to + i * s.dim, row.at[i], tile.channels, false);
                      });
  });
}

// grad_x, and with it grad_position's sum over the tokens of each frame.
template <class T, class Y, int K>
void backward_x(const DepthwiseConv3dBackward& p) {
  using A = wide_t<T>;
  const DepthwiseConv3dShape& s = p.shape;
  const Source source(s, p.grad_y, p.grad_y_strides, nullptr);
  const int64_t tokens = s.prefix + s.height * s.width;
  for_each_frame_block<A>(s, s.frames, [&](int64_t batch, int64_t frame, const Tile& block) {
    const Weights<A, K> weights(p.weight, s.dim, block, true);
    alignas(64) const A no_bias[kChannels<A>] = {};
    alignas(64) A sum[kChannels<A>] = {};
    T* grad_x = p.grad_x ? static_cast<T*>(p.grad_x) + (batch * s.frames + frame) * tokens * s.dim : nullptr;
    if (grad_x && !p.accumulate) clear_prefix(grad_x, s, block);
    convolve_frame<Y>(source, batch, gradients_read(s, frame), weights, block, no_bias,
                      [&](int64_t r, const Tile& tile, const Row<A>& row) {
                        if (grad_x) {
                          T* to = grad_x + (s.prefix + r * s.width + tile.column) * s.dim + tile.channel;
                          for (int i = 0; i < tile.columns; ++i)
                            store_token(to + i * s.dim, row.at[i], tile.channels, p.accumulate);
                        }
                        if (!p.grad_position) return;
                        alignas(64) A row_sum[kChannels<A>] = {};  // a sum of sums loses less than one long sum
                        for (int i = 0; i < tile.columns; ++i)
                          for (int c = 0; c < kChannels<A>; ++c) row_sum[c] += c < tile.channels ? row.at[i][c] : A(0);
                        for (int c = 0; c < kChannels<A>; ++c) sum[c] += row_sum[c];
                      });
    if (!p.grad_position) return;
    A* partial = static_cast<A*>(p.position_partials) + (batch * s.frames + frame) * s.dim + block.channel;
    for (int c = 0; c < block.channels; ++c) partial[c] = sum[c];
  });
}

// The gradient of the taps, in the order (t, h, w), and in the last row of the bias, for one block of channels.
template <class A, int K>
struct alignas(64) WeightSums {
  static constexpr int kRows = kKernelTime * K * K + 1;
  A rows[kRows][kChannels<A>];

  void clear() {
    for (auto& row : rows)
      for (A& sum : row) sum = 0;
  }
  void add(const WeightSums& other) {
    for (int row = 0; row < kRows; ++row)
      for (int c = 0; c < kChannels<A>; ++c) rows[row][c] += other.rows[row][c];
  }
};

// Adds the products of one row of x and the rows of the gradient that it is read for, grads[h] through row h of the
// taps, h in [begin, end): K² sums stay in registers along the row.
template <int K, class A>
INTI_INLINE void add_row_products(const Row<A>& row, const Row<A>* const* grads, int begin, int end, const Tile& tile,
                                  A (*taps)[kChannels<A>]) {
  for (int c = 0; c < tile.channels; c += kLanes<A>) {
    Vec<A> sums[K][K] = {};
    for (int i = 0; i < tile.columns; ++i) {
      Vec<A> x[K];
#pragma GCC unroll 3
      for (int w = 0; w < K; ++w) x[w] = load(&row.at[i + w][c]);
#pragma GCC unroll 3
      for (int h = 0; h < K; ++h) {
        const Vec<A> g = load(&grads[h]->at[i][c]);
#pragma GCC unroll 3
        for (int w = 0; w < K; ++w) sums[h][w] += g * x[w];
      }
    }
#pragma GCC unroll 3
    for (int h = 0; h < K; ++h)
      if (h >= begin && h < end)
#pragma GCC unroll 3
        for (int w = 0; w < K; ++w) store(&taps[h * K + w][c], load(&taps[h * K + w][c]) + sums[h][w]);
  }
}

template <class A>
INTI_INLINE void add_row(const Row<A>& grad, const Tile& tile, A* bias) {
  for (int c = 0; c < tile.channels; c += kLanes<A>) {
    Vec<A> sum{};
    for (int i = 0; i < tile.columns; ++i) sum += load(&grad.at[i][c]);
    store(bias + c, load(bias + c) + sum);
  }
}

template <class T, class Y, int K, class A>
void add_frame_products(const Source& x, const Source& grad_y, int64_t batch, int64_t out_frame, const FrameTaps& taps,
                        Tile tile, WeightSums<A, K>& sums) {
  constexpr int halo = K / 2, width = kColumns - 2 * halo;
  Row<A> row, slots[K];  // row r of the gradient lies in slot r mod K
  for (tile.column = 0; tile.column < x.width; tile.column += width) {
    tile.columns = int(x.width - tile.column < width ? x.width - tile.column : width);
    for (int64_t r = -2 * halo; r < x.height; ++r) {
      Row<A>& next = slots[(r + halo + K) % K];
      stage_row<Y>(grad_y, batch, out_frame, r + halo, tile, 0, next);
      if (r + halo >= 0 && r + halo < x.height) add_row(next, tile, sums.rows[sums.kRows - 1]);
      if (r < 0) continue;
      const Row<A>* grads[K];
      for (int h = 0; h < K; ++h) grads[h] = &slots[(r - h + halo + K) % K];
      // Outside of the grid there is no gradient, not one of 0, which x may make NaN.
      const int begin = r + halo < x.height ? 0 : halo, end = r >= halo ? K : K - halo;
      for (int f = 0; f < taps.count; ++f) {
        stage_row<T>(x, batch, taps.at[f].frame, r, tile, halo, row);
        add_row_products<K>(row, grads, begin, end, tile, sums.rows + taps.at[f].tap * K * K);
      }
    }
  }
}

template <class T, class Y, int K>
void backward_weight(const DepthwiseConv3dBackward& p) {
  using A = wide_t<T>;
  const DepthwiseConv3dShape& s = p.shape;
  const Source x(s, p.x, p.x_strides, p.position), grad_y(s, p.grad_y, p.grad_y_strides, nullptr);
  const int64_t out_frames = s.frames / s.temporal_stride, all = s.batch * out_frames;
  const int64_t chunks = depthwise_conv3d_chunks(s.batch, out_frames),
                blocks = (s.dim + kChannels<A> - 1) / kChannels<A>;
  parallel_for(chunks * blocks, s.threads, [&](int64_t i) {
    const int64_t chunk = i / blocks;
    const Tile block = channel_tile(s.dim, i % blocks, kChannels<A>);
    WeightSums<A, K> sums, frame_sums;
    sums.clear();
    for (int64_t frame = all * chunk / chunks; frame < all * (chunk + 1) / chunks; ++frame) {
      frame_sums.clear();
      const int64_t out_frame = frame % out_frames;
      add_frame_products<T, Y>(x, grad_y, frame / out_frames, out_frame, frames_read(s, out_frame), block, frame_sums);
      sums.add(frame_sums);
    }
    A* partial = static_cast<A*>(p.weight_partials) + chunk * sums.kRows * s.dim + block.channel;
    for (int row = 0; row < sums.kRows; ++row)
      for (int c = 0; c < block.channels; ++c) partial[row * s.dim + c] = sums.rows[row][c];
  });
}

// out[i] = Σ partials[·, i], in order.
template <class A>
void reduce(const void* partials, int64_t count, int64_t size, int threads, void* out) {
  const A* from = static_cast<const A*>(partials);
  A* to = static_cast<A*>(out);
  constexpr int64_t block = 1024;
  parallel_for((size + block - 1) / block, threads, [&](int64_t b) {
    const int64_t end = (b + 1) * block < size ? (b + 1) * block : size;
    for (int64_t i = b * block; i < end; ++i) to[i] = 0;
    for (int64_t k = 0; k < count; ++k)
      for (int64_t i = b * block; i < end; ++i) to[i] += from[k * size + i];
  });
}

template <class T, class Y, int K>
void backward(const DepthwiseConv3dBackward& p) {
  using A = wide_t<T>;
  const DepthwiseConv3dShape& s = p.shape;
  if (p.grad_x || p.grad_position) backward_x<T, Y, K>(p);
  if (p.grad_position) reduce<A>(p.position_partials, s.batch, s.frames * s.dim, s.threads, p.grad_position);
  if (p.grad_weight) {
    backward_weight<T, Y, K>(p);
    const int64_t chunks = depthwise_conv3d_chunks(s.batch, s.frames / s.temporal_stride);
    reduce<A>(p.weight_partials, chunks, WeightSums<A, K>::kRows * s.dim, s.threads, p.grad_weight);
  }
}

// Calls f with the Types of x and of y; other pairs than a convolution has never come here.
template <class F>
void by_dtypes(const DepthwiseConv3dShape& shape, const F& f) {
  by_dtype(shape.dtype, [&](auto x) {
    if (shape.result == shape.dtype) return f(x, x);
    if constexpr (sizeof(element_t<decltype(x)>) == sizeof(float))
      by_dtype(shape.result, [&](auto y) {
        if constexpr (sizeof(element_t<decltype(y)>) < sizeof(float)) f(x, y);
      });
  });
}

}  // namespace

void depthwise_conv3d_forward(const DepthwiseConv3dForward& p) {
  by_dtypes(p.shape, [&](auto x, auto y) {
    using T = element_t<decltype(x)>;
    using Y = element_t<decltype(y)>;
    p.shape.kernel_space == 3 ? forward<T, Y, 3>(p) : forward<T, Y, 1>(p);
  });
}

void depthwise_conv3d_backward(const DepthwiseConv3dBackward& p) {
  by_dtypes(p.shape, [&](auto x, auto y) {
    using T = element_t<decltype(x)>;
    using Y = element_t<decltype(y)>;
    p.shape.kernel_space == 3 ? backward<T, Y, 3>(p) : backward<T, Y, 1>(p);
  });
}

}  // namespace inti::INTI_ISA
