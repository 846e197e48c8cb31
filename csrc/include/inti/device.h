// The only file that knows the compilers: nvcc, NVRTC, and g++ with the emulator in the place of a GPU. A .cu file
// includes this and the header of its op, keeps its host code in one block hidden from NVRTC, starts kernels by
// launch(), and touches memory by load() and store(): plain accesses here, counted and checked in the emulator, which
// defines the same names (csrc/emulator).
#pragma once

#include "inti/types.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>
#else
#include "emulator/emulator.h"
#endif

#ifndef __CUDACC_RTC__
#include <stdexcept>
#include <string>
#include <type_traits>

#include "inti/cuda/code_for.h"
#endif

namespace inti {

// --- Numbers ---------------------------------------------------------------------------------------------------------

// Sixteen bits as they lie in memory; arithmetic is float's.
struct float16 {
  unsigned short bits;
};
struct bfloat16 {
  unsigned short bits;
};

template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
// What T is summed in.
template <class T>
using Wide = typename WideOf<T>::type;

template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T at[N];
  __device__ __forceinline__ T& operator[](int i) { return at[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return at[i]; }
};

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(bfloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}
__device__ __forceinline__ float widen(float16 value) { return __half2float(__ushort_as_half(value.bits)); }

template <class T>
__device__ __forceinline__ T narrow(float value);
template <class T>
__device__ __forceinline__ T narrow(double value);

template <>
__device__ __forceinline__ float narrow<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ double narrow<double>(float value) {
  return value;
}
template <>
__device__ __forceinline__ float16 narrow<float16>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}
template <>
__device__ __forceinline__ bfloat16 narrow<bfloat16>(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  // To nearest, ties to even, by bits; a NaN stays one.
  const unsigned bits = __float_as_uint(value);
  const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<unsigned short>(value == value ? rounded : 0x7fffu)};
#endif
}
template <>
__device__ __forceinline__ double narrow<double>(double value) {
  return value;
}
template <>
__device__ __forceinline__ float narrow<float>(double value) {
  return static_cast<float>(value);
}
template <>
__device__ __forceinline__ float16 narrow<float16>(double value) {
  return narrow<float16>(static_cast<float>(value));
}
template <>
__device__ __forceinline__ bfloat16 narrow<bfloat16>(double value) {
  return narrow<bfloat16>(static_cast<float>(value));
}

template <class T, int N>
__device__ __forceinline__ Vec<Wide<T>, N> widen(const Vec<T, N>& narrow) {
  Vec<Wide<T>, N> wide;
#pragma unroll
  for (int i = 0; i < N; ++i) wide[i] = widen(narrow[i]);
  return wide;
}
template <class T, class W, int N>
__device__ __forceinline__ Vec<T, N> narrow(const Vec<W, N>& wide) {
  Vec<T, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) result[i] = narrow<T>(wide[i]);
  return result;
}

#ifdef __CUDACC__
// Sixteen-bit numbers in twos: the compiler does not see by itself that an instruction can name either half of a
// register, and would take each number out of it first.
template <int N>
__device__ __forceinline__ Vec<float, N> widen(const Vec<float16, N>& narrow) {
  Vec<float, N> wide;
  if constexpr (N % 2 == 0) {
    union {
      Vec<float16, N> numbers;
      __half2 pairs[N / 2];
    } both;
    both.numbers = narrow;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      wide[2 * i] = __low2float(both.pairs[i]);
      wide[2 * i + 1] = __high2float(both.pairs[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) wide[i] = widen(narrow[i]);
  }
  return wide;
}
template <int N>
__device__ __forceinline__ Vec<float, N> widen(const Vec<bfloat16, N>& narrow) {
  Vec<float, N> wide;
  if constexpr (N % 2 == 0) {
    union {
      Vec<bfloat16, N> numbers;
      unsigned pairs[N / 2];
    } both;
    both.numbers = narrow;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      wide[2 * i] = __uint_as_float(both.pairs[i] << 16);
      wide[2 * i + 1] = __uint_as_float(both.pairs[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) wide[i] = widen(narrow[i]);
  }
  return wide;
}
#endif

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float error_function(float x) { return erff(x); }
__device__ __forceinline__ double error_function(double x) { return erf(x); }
__device__ __forceinline__ float inverse_root(float x) { return 1.0f / sqrtf(x); }
__device__ __forceinline__ double inverse_root(double x) { return 1.0 / sqrt(x); }

// --- Memory ----------------------------------------------------------------------------------------------------------

#ifdef __CUDACC__

template <int BYTES>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// N consecutive numbers in one access of up to 16 bytes, to which `at` must be aligned. Global memory.
template <int N, class T>
__device__ __forceinline__ Vec<T, N> load(const T* at) {
  union {
    typename Word<N * sizeof(T)>::type word;
    Vec<T, N> vec;
  } access;
  access.word = *reinterpret_cast<const typename Word<N * sizeof(T)>::type*>(at);
  return access.vec;
}
template <int N, class T>
__device__ __forceinline__ void store(T* at, const Vec<T, N>& value) {
  union {
    typename Word<N * sizeof(T)>::type word;
    Vec<T, N> vec;
  } access;
  access.vec = value;
  *reinterpret_cast<typename Word<N * sizeof(T)>::type*>(at) = access.word;
}

// Numbers on their way: what is loaded long before it is used. They stay the words that were loaded; 16-bit numbers
// would be taken out of them at once, and that waits for the memory.
template <class T, int N>
struct Loaded {
  typename Word<N * sizeof(T)>::type word;
  __device__ __forceinline__ Vec<T, N> numbers() const {
    union {
      typename Word<N * sizeof(T)>::type word;
      Vec<T, N> vec;
    } access;
    access.word = word;
    return access.vec;
  }
};
template <class T, int N>
__device__ __forceinline__ Loaded<T, N> loaded(const Vec<T, N>& numbers) {
  union {
    typename Word<N * sizeof(T)>::type word;
    Vec<T, N> vec;
  } access;
  access.vec = numbers;
  return {access.word};
}
template <int N, class T>
__device__ __forceinline__ Loaded<T, N> start_load(const T* at) {
  return {*reinterpret_cast<const typename Word<N * sizeof(T)>::type*>(at)};
}

// A place in the block's shared memory.
template <class T>
struct Shared {
  T* at;
  __device__ __forceinline__ Shared operator+(int n) const { return {at + n}; }
};

// All shared memory is dynamic; a kernel lays it out by byte offsets, 16-byte aligned at 0.
template <class T>
__device__ __forceinline__ Shared<T> dynamic_shared(int byte_offset) {
  extern __shared__ __align__(16) unsigned char inti_dynamic_shared[];
  return {reinterpret_cast<T*>(inti_dynamic_shared + byte_offset)};
}

template <int N, class T>
__device__ __forceinline__ Vec<T, N> load(Shared<T> from) {
  return load<N>(static_cast<const T*>(from.at));
}
template <int N, class T>
__device__ __forceinline__ void store(Shared<T> to, const Vec<T, N>& value) {
  store(to.at, value);
}

#else
}  // namespace inti
#include "emulator/memory.h"
namespace inti {
#endif  // __CUDACC__

// One number, global or shared.
template <class Pointer>
__device__ __forceinline__ auto load(Pointer from) {
  return load<1>(from)[0];
}
template <class Pointer, class T>
__device__ __forceinline__ void store(Pointer to, T value) {
  store(to, Vec<T, 1>{{value}});
}

// Element i of an array whose dtype is known when the kernel runs; for what is small beside the tokens.
template <class W>
__device__ __forceinline__ W read(const void* from, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::float32:
      return static_cast<W>(load(static_cast<const float*>(from) + i));
    case DType::float64:
      return static_cast<W>(load(static_cast<const double*>(from) + i));
    case DType::bfloat16:
      return static_cast<W>(widen(load(static_cast<const bfloat16*>(from) + i)));
    default:
      return static_cast<W>(widen(load(static_cast<const float16*>(from) + i)));
  }
}
template <class W>
__device__ __forceinline__ void write(void* to, DType dtype, int64_t i, W value) {
  switch (dtype) {
    case DType::float32:
      return store(static_cast<float*>(to) + i, narrow<float>(value));
    case DType::float64:
      return store(static_cast<double*>(to) + i, narrow<double>(value));
    case DType::bfloat16:
      return store(static_cast<bfloat16*>(to) + i, narrow<bfloat16>(value));
    default:
      return store(static_cast<float16*>(to) + i, narrow<float16>(value));
  }
}

// --- Tensor cores ----------------------------------------------------------------------------------------------------
// 16×16×16 products of float16 (bfloat16 from sm_80 on) with float sums. A is row-major; B is column-major, as the
// weight [out, in] of a Linear is.

namespace wmma = nvcuda::wmma;

template <class T>
struct WmmaTypeOf;
template <>
struct WmmaTypeOf<float16> {
  using type = __half;
};
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
template <>
struct WmmaTypeOf<bfloat16> {
  using type = __nv_bfloat16;
};
#endif
template <class T>
using FragmentA = wmma::fragment<wmma::matrix_a, 16, 16, 16, typename WmmaTypeOf<T>::type, wmma::row_major>;
template <class T>
using FragmentB = wmma::fragment<wmma::matrix_b, 16, 16, 16, typename WmmaTypeOf<T>::type, wmma::col_major>;
using FragmentSum = wmma::fragment<wmma::accumulator, 16, 16, 16, float>;

#ifdef __CUDACC__
// `from` must be 32-byte aligned, and `pitch` (elements from row to row; of B, from column to column) a multiple of 8.
template <class Fragment, class T>
__device__ __forceinline__ void load_fragment(Fragment& fragment, Shared<T> from, int pitch) {
  wmma::load_matrix_sync(fragment, reinterpret_cast<const typename WmmaTypeOf<T>::type*>(from.at), pitch);
}
__device__ __forceinline__ void store_fragment(Shared<float> to, const FragmentSum& fragment, int pitch) {
  wmma::store_matrix_sync(to.at, fragment, pitch, wmma::mem_row_major);
}
#else
}  // namespace inti
#include "emulator/fragments.h"
namespace inti {
#endif

// --- Host ------------------------------------------------------------------------------------------------------------
#ifndef __CUDACC_RTC__

// How a kernel is started. Grids are one-dimensional.
struct Launch {
  const char* kernel;  // its name, for messages
  int64_t blocks;
  int threads;
  int shared_bytes;
  void* stream;
  int most_threads = 1024;  // what the kernel's __launch_bounds__ say, for the emulator, which can't read them
};

inline std::string describe(const Launch& how) {
  return std::string(how.kernel) + " (" + std::to_string(how.blocks) + " blocks of " + std::to_string(how.threads) +
         " threads, " + std::to_string(how.shared_bytes) + " bytes of shared memory)";
}

#ifdef __CUDACC__

#ifndef INTI_CUDA_ARCHS
#define INTI_CUDA_ARCHS ""  // compiled by hand: nothing is known of what for
#endif

// Compute capability of the current device, 70 for 7.0.
inline int compute_capability() {
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return 10 * major + minor;
}

inline void check(cudaError_t error, const Launch& how) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // said once, here
  std::string message = "inti_kernels: " + describe(how) + " failed: " + cudaGetErrorString(error);
  // The last of them: PTX that this driver is too old to compile. Machine code needs no compiling.
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
      error == cudaErrorUnsupportedPtxVersion)
    message += "; " + built_for_others(INTI_CUDA_ARCHS, compute_capability());
  throw std::runtime_error(message);
}

inline int compiled_for() { return code_for(INTI_CUDA_ARCHS, compute_capability()); }

// Starts a kernel in a stream and returns at once. Throws std::runtime_error if it does not start.
template <class... Parameters>
void launch(void (*kernel)(Parameters...), const Launch& how, Parameters... parameters) {
  if (how.blocks == 0) return;
  if (how.blocks > 0x7fffffff) throw std::runtime_error("inti_kernels: " + describe(how) + ": too many blocks");
  if (how.shared_bytes > 48 * 1024) {
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, how.shared_bytes), how);
  }
  void* pointers[] = {&parameters...};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(how.blocks)),
                         dim3(static_cast<unsigned>(how.threads)), pointers, static_cast<size_t>(how.shared_bytes),
                         static_cast<cudaStream_t>(how.stream)),
        how);
}

#else
}  // namespace inti
#include "emulator/launch.h"
namespace inti {
#endif  // __CUDACC__

// Calls f with a number of the type that dtype names.
template <class F>
void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::float32:
      return f(float{});
    case DType::float64:
      return f(double{});
    case DType::bfloat16:
      return f(bfloat16{});
    case DType::float16:
      return f(float16{});
  }
  throw std::invalid_argument("inti_kernels: unknown dtype");
}

// What numbers of a dtype are summed in.
constexpr DType wide_dtype(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

// A number as a type, for choosing among kernels.
template <int N>
using Constant = std::integral_constant<int, N>;

// Whether rows can be read and written 16 bytes at a time.
inline bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }
inline bool divides(int64_t unit, const Strides& s) {
  return s.batch % unit == 0 && s.frame % unit == 0 && s.token % unit == 0;
}

#endif  // __CUDACC_RTC__

}  // namespace inti
