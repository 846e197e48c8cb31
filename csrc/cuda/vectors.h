// Runs of elements at the edge of a row: V elements at a time, and only those that are there.
#pragma once

#include "inti/device.h"

namespace inti::cuda {

// Elements of an access of up to 16 bytes in runs of V elements, if those are accessed 16 bytes at a time themselves.
template <class W, int V>
constexpr int kWideStep = V * sizeof(W) > 16 ? 16 / sizeof(W) : V;

// Elements from `at` on, of which `left` are there; 0 for the rest. `left` is a multiple of V where V > 1.
template <int V, int N, class T>
__device__ __forceinline__ Vec<T, N> load_some(const T* at, int left) {
  Vec<T, N> run{};
#pragma unroll
  for (int i = 0; i < N; i += V) {
    if (i < left) {
      const auto part = load<V>(at + i);
#pragma unroll
      for (int k = 0; k < V; ++k) run[i + k] = part[k];
    }
  }
  return run;
}

// V elements of a wide array, beside as many of an array whose vectors they are.
template <int V, class W>
__device__ __forceinline__ Vec<W, V> load_wide(const W* at) {
  return load_some<kWideStep<W, V>, V>(at, V);
}

// Stores the first `left` elements, up to 16 bytes at a time if `vectors`, which says that addresses and `left` allow
// it.
template <class T, class W, int N>
__device__ __forceinline__ void store_some(T* to, const Vec<W, N>& run, int left, bool vectors) {
  constexpr int V = kWideStep<T, N>;
  const auto narrowed = narrow<T>(run);
#pragma unroll
  for (int i = 0; i < N; i += V) {
    if (vectors) {
      Vec<T, V> part;
#pragma unroll
      for (int k = 0; k < V; ++k) part[k] = narrowed[i + k];
      if (i < left) store(to + i, part);
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k)
        if (i + k < left) store(to + (i + k), narrowed[i + k]);
    }
  }
}

// Sixteen bytes of elements as words: whole they cost no instruction to move, two by two in a register. As device.h's
// Loaded they cost token_features' FMA product in bfloat16 87 registers in place of 80, and so a third block an SM.
template <class T>
struct Packed {
  static constexpr int kElements = 16 / sizeof(T);
  Vec<unsigned, 4> words;

  __device__ __forceinline__ Vec<T, kElements> unpacked() const {
    union {
      Vec<unsigned, 4> words;
      Vec<T, kElements> elements;
    } both;
    both.words = words;
    return both.elements;
  }
};

template <class T>
__device__ __forceinline__ Packed<T> packed(const Vec<T, 16 / sizeof(T)>& elements) {
  union {
    Vec<unsigned, 4> words;
    Vec<T, 16 / sizeof(T)> elements;
  } both;
  both.elements = elements;
  return {both.words};
}

// A full vector at `at`, V elements at a time.
template <int V, class T>
__device__ __forceinline__ Packed<T> load_packed(const T* at) {
  if constexpr (V > 1)
    return {load<4>(reinterpret_cast<const unsigned*>(at))};
  else
    return packed<T>(load_some<1, Packed<T>::kElements>(at, Packed<T>::kElements));
}

// As load_some().
template <int V, class T>
__device__ __forceinline__ Packed<T> load_packed(const T* at, int left) {
  if constexpr (V > 1)
    return {left > 0 ? load<4>(reinterpret_cast<const unsigned*>(at)) : Vec<unsigned, 4>{}};
  else
    return packed<T>(load_some<1, Packed<T>::kElements>(at, left));
}

// The same numbers as S, which is T or its wide type.
template <class S, class T, int N>
__device__ __forceinline__ Vec<S, N> converted(const Vec<T, N>& run) {
  if constexpr (sizeof(S) == sizeof(T))
    return run;
  else
    return widen(run);
}

// --- Host ------------------------------------------------------------------------------------------------------------
#ifndef __CUDACC_RTC__

template <class... Pointers>
bool all_aligned(Pointers... pointers) {
  return (aligned(pointers) && ...);
}

// Whether rows [..., dim] of T can be read and written 16 bytes at a time.
template <class T, class... Pointers>
bool whole_vectors(int64_t dim, const Strides& strides, Pointers... pointers) {
  constexpr int64_t unit = 16 / sizeof(T);
  return dim % unit == 0 && divides(unit, strides) && all_aligned(pointers...);
}

inline int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Calls f with a number of the dtype's type and, as a constant, the elements of a load: 16 bytes' worth if `full_width`
// (given the 16 bytes' worth) allows it, or 1.
template <class Test, class F>
void with_vectors(DType dtype, Test full_width, F f) {
  with_dtype(dtype, [&](auto number) {
    constexpr int unit = 16 / sizeof(number);
    if (full_width(unit))
      f(number, std::integral_constant<int, unit>{});
    else
      f(number, std::integral_constant<int, 1>{});
  });
}

#endif  // __CUDACC_RTC__

}  // namespace inti::cuda
