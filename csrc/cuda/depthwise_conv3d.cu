// depthwise_conv3d: depthwise 3-D convolution over the patch tokens where they lie, forward and backward. See
// depthwise_conv3d_tile.h for how the work is cut. Sums are rolled along the frames: a frame's tile is read once and
// feeds every output that it touches.
#include "inti/cuda/depthwise_conv3d.h"

#include "depthwise_conv3d_backward.h"
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
        if (place.live()) feed<P, SPACE>(tile, pitch, own_taps, {1}, {&at});
        return;
      }
      if (frame == begin && opens) {
        if (place.live()) feed<P, SPACE>(tile, pitch, own_taps, {0}, {&at});
        return;
      }
      if (place.live()) feed<P, SPACE>(tile, pitch, own_taps, {2, 0}, {&at, &behind});
      writer.write(at, place, frame / 2);
      at = behind;
      open(behind);
    } else {
      if (frame == begin && opens) {
        if (place.live()) feed<P, SPACE>(tile, pitch, own_taps, {0}, {&at});
        return;
      }
      if (frame == place.first) {  // at: this frame's output; behind: the next one's
        if (place.live()) feed<P, SPACE>(tile, pitch, own_taps, {1, 0}, {&at, &behind});
        return;
      }
      before = at;
      at = behind;
      open(behind);
      if (place.live()) feed<P, SPACE>(tile, pitch, own_taps, {2, 1, 0}, {&before, &at, &behind});
      writer.write(before, place, frame - 1);
    }
  });
  // Without a frame behind it the last output has all it gets.
  if (STRIDE == 1 && place.last == p.frames) writer.write(at, place, place.last - 1);
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

// Frames and patches are shared out by division. Places inside a clip are counted in int; memory is addressed in 64
// bits.
void check_sizes(const DepthwiseConv3dShape& s) {
  if (s.temporal_stride < 1 || s.frames < s.temporal_stride || s.height < 1 || s.width < 1) {
    const auto got = [](const char* name, int64_t size) { return std::string(name) + std::to_string(size); };
    throw std::invalid_argument(
        "inti_kernels: depthwise_conv3d takes height and width of 1 or more, and frames to fill a temporal_stride; " +
        got("got height ", s.height) + got(", width ", s.width) + got(", frames ", s.frames) +
        got(", temporal_stride ", s.temporal_stride));
  }
  const int64_t most = 1 << 30;
  if (s.frames > most || s.prefix > most || s.dim > most || s.height > most || s.width > most / s.height)
    throw std::invalid_argument("inti_kernels: depthwise_conv3d takes frames, prefix, height·width and dim up to 2^30");
}

DepthwiseConv3dTiling depthwise_conv3d_tiling(const DepthwiseConv3dShape& s) {
  check_sizes(s);
  DepthwiseConv3dTiling result{};
  with_dtype(s.dtype, [&](auto number) {
    const Tiling tiling = tiling_of<decltype(number)>(s, patches_of(s));
    result = {tiling.tiles, tiling.runs};
  });
  return result;
}

// Calls f.template operator()<V, P, SPACE, STRIDE>() with the numbers of the shape.
// VECTOR: elements of a full-width access.
template <int VECTOR, class T, class F>
void with_shape(const DepthwiseConv3dShape& s, bool full_width, F f) {
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
    with_patches(Constant<VECTOR>{});
  else
    with_patches(Constant<1>{});
}

template <class T>
Launch launch_of(const char* kernel, const DepthwiseConv3dShape& s, const Tiling& t, int shared_bytes, void* stream) {
  return {kernel, s.batch * t.slabs * t.tiles * t.runs, t.threads, shared_bytes, stream, kLanes * kMostStrips<T>};
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
  with_shape<16 / sizeof(T), T>(s, whole, [&](auto v, auto patches, auto space, auto stride) {
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

// float64, for gradient checks, has no registers for both the weight's sums and vectors under way.
template <class T, bool WEIGHT>
constexpr int kBackwardVector = WEIGHT && sizeof(T) == 8 ? 1 : 16 / sizeof(T);

template <class T, bool WEIGHT>
void backward(const DepthwiseConv3dBackward& p, SumList& sums) {
  const DepthwiseConv3dShape& s = p.shape;
  const bool whole = whole_vectors<T>(s.dim, p.grad_y_strides, p.grad_y, p.grad_x) &&
                     (!WEIGHT || whole_vectors<T>(s.dim, p.x_strides, p.x, p.position));
  with_shape<kBackwardVector<T, WEIGHT>, T>(s, whole, [&](auto v, auto patches, auto space, auto stride) {
    constexpr int V = v.value, P = patches.value, SPACE = space.value, STRIDE = stride.value;
    const Tiling t = tiling_of<T>(s, P);
    ConvolutionBackward<T> q{};
    static_cast<ConvolutionSizes&>(q) = sizes_of(s, t);
    q.grad_y = static_cast<const T*>(p.grad_y);
    q.grad_strides = p.grad_y_strides;
    q.weight = p.weight;
    q.parameter_dtype = s.parameter_dtype;
    q.grad_x = static_cast<T*>(p.grad_x);
    q.accumulate = p.accumulate;
    q.position_partials = static_cast<Wide<T>*>(p.position_partials);
    q.x = static_cast<const T*>(p.x);
    q.x_strides = p.x_strides;
    q.position = static_cast<const Wide<T>*>(p.position);
    q.weight_partials = static_cast<Wide<T>*>(p.weight_partials);
    const int bytes = backward_bytes<T, V, P, SPACE, WEIGHT>(t);
    launch(depthwise_conv3d_backward_kernel<T, V, P, SPACE, STRIDE, WEIGHT>,
           launch_of<T>("depthwise_conv3d_backward_kernel", s, t, bytes, p.stream), q);
    sums.add_wide(p.grad_position, p.position_partials, s.batch * t.tiles, s.frames * s.dim);
    if (!WEIGHT) return;
    constexpr int64_t kTaps = 3 * SPACE * SPACE;
    const int64_t rows = s.batch * t.runs * t.tiles, pitch = s.dim * (kTaps + 1);
    const DType dtype = s.parameter_dtype;
    // The last of each channel's sums is the bias's.
    sums.add({q.weight_partials, rows, pitch, s.dim * kTaps, kTaps, kTaps + 1, p.grad_weight, dtype, false, false});
    sums.add({q.weight_partials + kTaps, rows, pitch, s.dim, 1, kTaps + 1, p.grad_bias, dtype, false, false});
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
    if (p.weight_partials)
      backward<T, true>(p, sums);
    else if (p.grad_x || p.position_partials)
      backward<T, false>(p, sums);
    sums.launch();
  });
}

#endif  // __CUDACC_RTC__

}  // namespace inti::cuda
