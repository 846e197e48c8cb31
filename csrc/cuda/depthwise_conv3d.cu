// depthwise_conv3d: depthwise 3-D convolution over the patch tokens where they lie, forward and backward. See
// depthwise_conv3d_tile.h for how the work is cut. Sums are rolled along the frames: a frame's tile is read once and
// feeds every output that it touches.
#include "inti/cuda/depthwise_conv3d.h"

#include "depthwise_conv3d_sums.h"
#include "depthwise_conv3d_weight.h"
#include "partial_sums.h"

namespace inti::cuda {

// --- Forward ---------------------------------------------------------------------------------------------------------

template <class T>
struct ConvolutionForward : ConvolutionSizes {
  const T* x;
  Strides x_strides;
  const void* weight;
  const void* bias;
  DType parameter_dtype;
  const Wide<T>* position;
  T* y;
};

// 256 threads, 2 blocks an SM (128 registers; float64, for gradient checks, and unaligned rows take what they need): 16
// warps, whose next frame's 16-byte loads, two or three a thread, are under way while they compute: 12 KiB and more.
template <class T, int V>
constexpr int kBlocks = sizeof(T) == 8 || V == 1 ? 1 : 2;

template <class T, int V, int P, int SPACE, int STRIDE>
__global__ void __launch_bounds__(kLanes* kMostStrips<T>, kBlocks<T, V>)
    depthwise_conv3d_forward_kernel(const ConvolutionForward<T> p) {
  constexpr int C = kChannelsPerThread<T>, TAPS = 3 * SPACE * SPACE;
  const int out_frames = p.frames / STRIDE, patches = p.height * p.width;
  const Place<T, P> place(p.tiling, p.height, p.width, out_frames);
  const Layout<T, V, P, SPACE> layout(p.tiling);
  const int pitch = tile_pitch<P, SPACE>(p.tiling.strips);
  const Shared<Wide<T>> taps = dynamic_shared<Wide<T>>(layout.taps);
  const Shared<T> buffers = dynamic_shared<T>(layout.tiles);
  stage_taps<TAPS, T>(taps, p.weight, p.bias, p.parameter_dtype, place.channel, p.dim);
  const Output<T> out{p.y, (static_cast<int64_t>(place.clip) * out_frames * (p.prefix + patches) + p.prefix) * p.dim,
                      (p.prefix + patches) * p.dim, p.dim, false};
  if (place.tile == 0) clear_prefix<V>(place, out, p.prefix, place.first, place.last);

  const Writer<T, V, P> writer(place, p.tiling, out, dynamic_shared<T>(layout.exchange),
                               dynamic_shared<int64_t>(layout.offsets));

  const int64_t start = static_cast<int64_t>(place.clip) * p.x_strides.batch + p.prefix * p.x_strides.token;
  Stager<T, V, P, SPACE> stager(place, p.tiling, Frames<T>{p.x, start, p.x_strides.frame, p.x_strides.token},
                                p.position, p.dim, layout);
  const Shared<Wide<T>> own_taps = taps + place.lane * C;
  const int own = (place.row * pitch + place.column) * kSlab<T> + place.lane * C;
  Sums<T, P> before, at, behind;  // the outputs that a frame feeds, by its time taps 2, 1 and 0

  // The first frame feeds the first output by its time tap 0, or does not exist.
  int begin = STRIDE * place.first - 1, end = STRIDE == 1 ? place.last + 1 : STRIDE * place.last;
  const bool opens = begin >= 0;
  if (!opens) begin = 0;
  if (end > p.frames) end = p.frames;
  walk(stager, buffers, layout.tile, begin, end, [&](int frame, Shared<T> tile) {
    // Outputs start from the bias, which stays in shared memory.
    const auto open = [&](Sums<T, P>& sums) { sums.set(load<C>(own_taps + TAPS * kSlab<T>)); };
    if (frame == begin) {
      open(at);
      open(behind);
    }
    tile = tile + own;
    if (STRIDE == 2) {
      if (frame % 2 == 0) {
        if (place.live()) feed<P, SPACE, false>(tile, pitch, own_taps, {1}, {&at});
        return;
      }
      if (frame == begin && opens) {
        if (place.live()) feed<P, SPACE, false>(tile, pitch, own_taps, {0}, {&at});
        return;
      }
      if (place.live()) feed<P, SPACE, false>(tile, pitch, own_taps, {2, 0}, {&at, &behind});
      writer.write(at, place, frame / 2);
      at = behind;
      open(behind);
    } else {
      if (frame == begin && opens) {
        if (place.live()) feed<P, SPACE, false>(tile, pitch, own_taps, {0}, {&at});
        return;
      }
      if (frame == place.first) {  // at: this frame's output; behind: the next one's
        if (place.live()) feed<P, SPACE, false>(tile, pitch, own_taps, {1, 0}, {&at, &behind});
        return;
      }
      before = at;
      at = behind;
      open(behind);
      if (place.live()) feed<P, SPACE, false>(tile, pitch, own_taps, {2, 1, 0}, {&before, &at, &behind});
      writer.write(before, place, frame - 1);
    }
  });
  // Without a frame behind it the last output has all it gets.
  if (STRIDE == 1 && place.last == p.frames) writer.write(at, place, place.last - 1);
}

// --- Backward to x and position --------------------------------------------------------------------------------------

template <class T>
struct ConvolutionBackwardX : ConvolutionSizes {
  const T* grad_y;
  Strides grad_strides;
  const void* weight;
  DType parameter_dtype;
  T* grad_x;  // or null
  bool accumulate;
  Wide<T>* partials;  // [batch · tiles, frames, dim], or null: the position's
};

// The gather form: every element of grad_x is written by one block, once. grad_y's frames are what is walked along, and
// an open frame of grad_x takes the taps turned round. Occupancy as the forward's.
template <class T, int V, int P, int SPACE, int STRIDE>
__global__ void __launch_bounds__(kLanes* kMostStrips<T>, kBlocks<T, V>)
    depthwise_conv3d_backward_x_kernel(const ConvolutionBackwardX<T> p) {
  constexpr int C = kChannelsPerThread<T>, TAPS = 3 * SPACE * SPACE;
  const int out_frames = p.frames / STRIDE, patches = p.height * p.width;
  const Place<T, P> place(p.tiling, p.height, p.width, out_frames);
  const Layout<T, V, P, SPACE> layout(p.tiling);
  const int pitch = tile_pitch<P, SPACE>(p.tiling.strips);
  const Shared<Wide<T>> taps = dynamic_shared<Wide<T>>(layout.taps);
  const Shared<Wide<T>> warp_sums = dynamic_shared<Wide<T>>(layout.sums);
  const Shared<T> buffers = dynamic_shared<T>(layout.tiles);
  stage_taps<TAPS, T>(taps, p.weight, nullptr, p.parameter_dtype, place.channel, p.dim);
  const int64_t frame_size = (p.prefix + patches) * p.dim;
  const Output<T> out{p.grad_x, static_cast<int64_t>(place.clip) * p.frames * frame_size + p.prefix * p.dim, frame_size,
                      p.dim, p.accumulate};
  const Writer<T, V, P> writer(place, p.tiling, out, dynamic_shared<T>(layout.exchange),
                               dynamic_shared<int64_t>(layout.offsets));
  if (place.tile == 0 && p.grad_x && !p.accumulate)
    clear_prefix<V>(place, out, p.prefix, STRIDE * place.first, STRIDE * place.last);
  Wide<T>* partials = p.partials;
  if (partials) partials += (static_cast<int64_t>(place.clip) * p.tiling.tiles + place.tile) * p.frames * p.dim;

  const int64_t start = static_cast<int64_t>(place.clip) * p.grad_strides.batch + p.prefix * p.grad_strides.token;
  const Frames<T> frames{p.grad_y, start, p.grad_strides.frame, p.grad_strides.token};
  Stager<T, V, P, SPACE> stager(place, p.tiling, frames, nullptr, p.dim, layout);
  const Shared<Wide<T>> own_taps = taps + place.lane * C;
  const int own = (place.row * pitch + place.column) * kSlab<T> + place.lane * C;
  const auto finish_frame = [&](const Sums<T, P>& sums, int frame) {
    if (p.grad_x) writer.write(sums, place, frame);
    if (partials) sum_tile(sums, place, warp_sums, partials + frame * p.dim, p.dim);
  };
  Sums<T, P> before, at, behind;
  const Vec<Wide<T>, C> zero{};
  before.set(zero);
  at.set(zero);
  behind.set(zero);

  // Time taps are turned with the others: TURNED reads tap 2 - time.
  int begin = place.first, end = place.last + 1;
  if (STRIDE == 1 && begin > 0) --begin;
  if (end > out_frames) end = out_frames;
  walk(stager, buffers, layout.tile, begin, end, [&](int frame, Shared<T> tile) {
    tile = tile + own;
    if (STRIDE == 2) {
      // Frame j of grad_y feeds frames 2j - 1, 2j and 2j + 1 of grad_x by the taps 0, 1 and 2.
      before = behind;
      if (frame == place.last) {
        if (place.live()) feed<P, SPACE, true>(tile, pitch, own_taps, {2}, {&before});
        return;
      }
      at.set(zero);
      behind.set(zero);
      if (place.live()) feed<P, SPACE, true>(tile, pitch, own_taps, {2, 1, 0}, {&before, &at, &behind});
      if (frame > place.first) finish_frame(before, 2 * frame - 1);
      finish_frame(at, 2 * frame);
      before = behind;
    } else {
      // Frame j feeds frames j - 1, j and j + 1 by the taps 0, 1 and 2.
      if (frame < place.first) {
        if (place.live()) feed<P, SPACE, true>(tile, pitch, own_taps, {0}, {&at});
        return;
      }
      if (frame == place.first) {
        if (place.live()) feed<P, SPACE, true>(tile, pitch, own_taps, {1, 0}, {&at, &behind});
        return;
      }
      before = at;
      at = behind;
      behind.set(zero);
      if (place.live()) feed<P, SPACE, true>(tile, pitch, own_taps, {2, 1, 0}, {&before, &at, &behind});
      finish_frame(before, frame - 1);
    }
  });
  if (STRIDE == 2) finish_frame(before, 2 * place.last - 1);
  if (STRIDE == 1 && place.last == p.frames) finish_frame(at, place.last - 1);
}

// --- Host ------------------------------------------------------------------------------------------------------------
#ifndef __CUDACC_RTC__

template <class T>
Tiling tiling_of(const DepthwiseConv3dShape& s, int patches) {
  return tile_frames<T>(s.batch, s.height, s.width, s.dim, s.frames / s.temporal_stride, patches);
}

// Patches of a strip; a number of 16-bit 3×3×3 only is worth a second set of kernels.
int patches_of(const DepthwiseConv3dShape& s) {
  const bool narrow = s.dtype == DType::float16 || s.dtype == DType::bfloat16;
  return strip_patches(s.width, narrow && s.kernel_space == 3);
}

DepthwiseConv3dTiling depthwise_conv3d_tiling(const DepthwiseConv3dShape& s) {
  DepthwiseConv3dTiling result{};
  with_dtype(s.dtype, [&](auto number) {
    const Tiling tiling = tiling_of<decltype(number)>(s, patches_of(s));
    result = {tiling.tiles, tiling.runs};
  });
  return result;
}

// Calls f.template operator()<V, P, SPACE, STRIDE>() with the numbers of the shape.
template <class T, class F>
void with_shape(const DepthwiseConv3dShape& s, bool full_width, F f) {
  constexpr int kFull = 16 / sizeof(T);
  const auto with_case = [&](auto vector, auto patches) {
    if (s.kernel_space == 3 && s.temporal_stride == 2) return f(vector, patches, Constant<3>{}, Constant<2>{});
    if (s.kernel_space == 3 && s.temporal_stride == 1) return f(vector, patches, Constant<3>{}, Constant<1>{});
    throw std::invalid_argument(
        "inti_kernels: depthwise_conv3d takes 3×3×3 with stride 2 or 1 and 3×1×1 with stride 1");
  };
  const auto with_patches = [&](auto vector) {
    if (s.kernel_space == 1 && s.temporal_stride == 1) return f(vector, Constant<8>{}, Constant<1>{}, Constant<1>{});
    if constexpr (sizeof(T) == 2) {
      if (patches_of(s) == 7) return with_case(vector, Constant<7>{});
    }
    with_case(vector, Constant<8>{});
  };
  if (full_width)
    with_patches(Constant<kFull>{});
  else
    with_patches(Constant<1>{});
}

template <class T>
Launch launch_of(const char* kernel, const DepthwiseConv3dShape& s, const Tiling& t, int shared_bytes, void* stream) {
  return {kernel, s.batch * t.slabs * t.tiles * t.runs, t.threads, shared_bytes, stream, kLanes * kMostStrips<T>};
}

// Places inside a clip are counted in int; memory is addressed in 64 bits.
void check_sizes(const DepthwiseConv3dShape& s) {
  const int64_t most = 1 << 30;
  if (s.frames > most || s.prefix > most || s.dim > most || s.height > most || s.width > most / s.height)
    throw std::invalid_argument("inti_kernels: depthwise_conv3d takes frames, prefix, height·width and dim up to 2^30");
}

ConvolutionSizes sizes_of(const DepthwiseConv3dShape& s, const Tiling& t) {
  return {static_cast<int>(s.frames),
          static_cast<int>(s.height),
          static_cast<int>(s.width),
          static_cast<int>(s.prefix),
          s.dim,
          t};
}

template <class T>
void forward(const DepthwiseConv3dForward& p) {
  const DepthwiseConv3dShape& s = p.shape;
  const bool whole = whole_vectors<T>(s.dim, p.x_strides, p.x, p.y, p.position);
  with_shape<T>(s, whole, [&](auto v, auto patches, auto space, auto stride) {
    constexpr int V = v.value, P = patches.value, SPACE = space.value, STRIDE = stride.value;
    const Tiling t = tiling_of<T>(s, P);
    ConvolutionForward<T> q{};
    static_cast<ConvolutionSizes&>(q) = sizes_of(s, t);
    q.x = static_cast<const T*>(p.x);
    q.x_strides = p.x_strides;
    q.weight = p.weight;
    q.bias = p.bias;
    q.parameter_dtype = s.parameter_dtype;
    q.position = static_cast<const Wide<T>*>(p.position);
    q.y = static_cast<T*>(p.y);
    const int bytes = Layout<T, V, P, SPACE>(t).bytes;
    launch(depthwise_conv3d_forward_kernel<T, V, P, SPACE, STRIDE>,
           launch_of<T>("depthwise_conv3d_forward_kernel", s, t, bytes, p.stream), q);
  });
}

template <class T>
void backward_x(const DepthwiseConv3dBackward& p, SumList& sums) {
  const DepthwiseConv3dShape& s = p.shape;
  const bool whole = whole_vectors<T>(s.dim, p.grad_y_strides, p.grad_y, p.grad_x);
  with_shape<T>(s, whole, [&](auto v, auto patches, auto space, auto stride) {
    constexpr int V = v.value, P = patches.value, SPACE = space.value, STRIDE = stride.value;
    const Tiling t = tiling_of<T>(s, P);
    ConvolutionBackwardX<T> q{};
    static_cast<ConvolutionSizes&>(q) = sizes_of(s, t);
    q.grad_y = static_cast<const T*>(p.grad_y);
    q.grad_strides = p.grad_y_strides;
    q.weight = p.weight;
    q.parameter_dtype = s.parameter_dtype;
    q.grad_x = static_cast<T*>(p.grad_x);
    q.accumulate = p.accumulate;
    q.partials = static_cast<Wide<T>*>(p.position_partials);
    const int bytes = Layout<T, V, P, SPACE>(t).bytes;
    launch(depthwise_conv3d_backward_x_kernel<T, V, P, SPACE, STRIDE>,
           launch_of<T>("depthwise_conv3d_backward_x_kernel", s, t, bytes, p.stream), q);
    sums.add_wide(p.grad_position, p.position_partials, s.batch * t.tiles, s.frames * s.dim);
  });
}

template <class T>
void backward_weight(const DepthwiseConv3dBackward& p, SumList& sums) {
  const DepthwiseConv3dShape& s = p.shape;
  const bool whole =
      whole_vectors<T>(s.dim, p.x_strides, p.x, p.grad_y, p.position) && divides(16 / sizeof(T), p.grad_y_strides);
  with_shape<T>(s, whole, [&](auto v, auto patches, auto space, auto stride) {
    constexpr int V = v.value, P = patches.value, SPACE = space.value, STRIDE = stride.value;
    const Tiling t = tiling_of<T>(s, P);
    ConvolutionBackwardWeight<T> q{};
    static_cast<ConvolutionSizes&>(q) = sizes_of(s, t);
    q.x = static_cast<const T*>(p.x);
    q.x_strides = p.x_strides;
    q.grad_y = static_cast<const T*>(p.grad_y);
    q.grad_strides = p.grad_y_strides;
    q.position = static_cast<const Wide<T>*>(p.position);
    q.partials = static_cast<Wide<T>*>(p.weight_partials);
    launch(depthwise_conv3d_backward_weight_kernel<T, V, P, SPACE, STRIDE>,
           launch_of<T>("depthwise_conv3d_backward_weight_kernel", s, t, weight_bytes<T, V, P, SPACE>(t), p.stream), q);
    constexpr int64_t kTaps = 3 * SPACE * SPACE;
    const int64_t rows = s.batch * t.runs * t.tiles, pitch = s.dim * (kTaps + 1);
    const DType dtype = s.parameter_dtype;
    // The last of each channel's sums is the bias's.
    sums.add({q.partials, rows, pitch, s.dim * kTaps, kTaps, kTaps + 1, p.grad_weight, dtype, false, false});
    sums.add({q.partials + kTaps, rows, pitch, s.dim, 1, kTaps + 1, p.grad_bias, dtype, false, false});
  });
}

void depthwise_conv3d_forward(const DepthwiseConv3dForward& p) {
  check_sizes(p.shape);
  with_dtype(p.shape.dtype, [&](auto number) { forward<decltype(number)>(p); });
}

void depthwise_conv3d_backward(const DepthwiseConv3dBackward& p) {
  check_sizes(p.shape);
  with_dtype(p.shape.dtype, [&](auto number) {
    using T = decltype(number);
    SumList sums(p.shape.dtype, p.stream);
    if (p.grad_x || p.position_partials) backward_x<T>(p, sums);
    if (p.weight_partials) backward_weight<T>(p, sums);
    sums.launch();
  });
}

#endif  // __CUDACC_RTC__

}  // namespace inti::cuda
