// Vectors of the instruction set that this file is compiled for, and the numbers that are stored in 16 bits.
//
// Everything here has internal linkage: an inline function compiled for AVX-512 could otherwise be the one that the
// linker keeps for all. For the same reason nothing of the C++ library is used in the kernels.
#pragma once

#include <cstdint>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "inti/types.h"

namespace inti::INTI_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// g++ 11 has no _Float16 and g++ 12 never vectorises it: 16-bit numbers are our own structs, converted by hand.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// What T is computed in.
template <class T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};
template <class T>
using wide_t = typename Wide<T>::type;

template <class A>
struct VecOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename VecOf<A>::type;

template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));

typedef int32_t Int32s __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Uint32s __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Uint16s __attribute__((vector_size(kVectorBytes / 2)));

#define INTI_INLINE static inline __attribute__((always_inline))

template <class To, class From>
INTI_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

INTI_INLINE Vec<float> load(const float* p) {
  Vec<float> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

INTI_INLINE Vec<double> load(const double* p) {
  Vec<double> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

INTI_INLINE Uint32s load_16_bits(const void* p) {
  Uint16s bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return __builtin_convertvector(bits, Uint32s);
}

INTI_INLINE void store_16_bits(void* p, Uint32s bits) {
  Uint16s narrow = __builtin_convertvector(bits, Uint16s);
  __builtin_memcpy(p, &narrow, sizeof(narrow));
}

INTI_INLINE Vec<float> load(const bfloat16* p) { return bits_as<Vec<float>>(load_16_bits(p) << 16); }

INTI_INLINE Vec<float> load(const float16* p) {
#if defined(__AVX512F__)
  // The maskz form, since g++ 12 warns of an uninitialised operand inside its own header for the plain one.
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  // The bits moved to float's places make a number 2^112 too small, subnormals included; infinities and NaN keep an
  // exponent of ones.
  const Uint32s half = load_16_bits(p);
  const Uint32s magnitude = (half & 0x7fff) << 13;
  const Uint32s scaled = bits_as<Uint32s>(bits_as<Vec<float>>(magnitude) * 0x1p112f);
  const Uint32s special = magnitude | 0x7f800000;
  const Uint32s value = bits_as<Int32s>(magnitude) >= 0x0f800000 ? special : scaled;
  return bits_as<Vec<float>>(value | (half & 0x8000) << 16);
#endif
}

INTI_INLINE void store(float* p, Vec<float> v) { __builtin_memcpy(p, &v, sizeof(v)); }
INTI_INLINE void store(double* p, Vec<double> v) { __builtin_memcpy(p, &v, sizeof(v)); }

INTI_INLINE void store(bfloat16* p, Vec<float> v) {
  const Uint32s bits = bits_as<Uint32s>(v);
  const Uint32s rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const Uint32s quiet_nan = (bits >> 16) | 0x40;                       // rounding could carry a NaN into infinity
  store_16_bits(p, bits_as<Int32s>(bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded);
}

INTI_INLINE void store(float16* p, Vec<float> v) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
#elif defined(__F16C__)
  const __m128i half = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
#else
  const Uint32s bits = bits_as<Uint32s>(v);
  const Uint32s magnitude = bits & 0x7fffffff;
  const Int32s ordered = bits_as<Int32s>(magnitude);
  // Normal numbers: rebias the exponent by 127 - 15, round to nearest even; a carry out of 65504 gives infinity.
  const Uint32s normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal ones: adding 0.5 leaves the wanted bits, rounded by the addition itself, at the bottom of the sum.
  const Uint32s subnormal = bits_as<Uint32s>(bits_as<Vec<float>>(magnitude) + 0.5f) - 0x3f000000;
  Uint32s half = ordered < (113 << 23) ? subnormal : normal;
  half = ordered >= (143 << 23) ? Uint32s{} + 0x7c00 : half;
  half = ordered > 0x7f800000 ? Uint32s{} + 0x7e00 : half;
  store_16_bits(p, half | (bits & 0x80000000) >> 16);
#endif
}

// The first count < lanes elements; the rest of the vector is 0.
template <class T>
INTI_INLINE Vec<wide_t<T>> load_first(const T* p, int count) {
  T padded[kLanes<wide_t<T>>] = {};
  for (int i = 0; i < count; ++i) padded[i] = p[i];
  return load(padded);
}

template <class T>
INTI_INLINE void store_first(T* p, Vec<wide_t<T>> v, int count) {
  T padded[kLanes<wide_t<T>>];
  store(padded, v);
  for (int i = 0; i < count; ++i) p[i] = padded[i];
}

// Lane by lane in order: the same bits every time.
template <class A>
INTI_INLINE A sum_lanes(const Vec<A>& v) {
  A sum = 0;
  for (int i = 0; i < kLanes<A>; ++i) sum += v[i];
  return sum;
}

template <class A>
INTI_INLINE Vec<A> broadcast(A value) {
  return Vec<A>{} + value;
}

template <class T>
struct Type {
  using type = T;
};

// Calls f with the Type of the elements.
template <class F>
INTI_INLINE void by_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float32:
      return f(Type<float>{});
    case DType::float64:
      return f(Type<double>{});
    case DType::bfloat16:
      return f(Type<bfloat16>{});
    case DType::float16:
      return f(Type<float16>{});
  }
}

template <class Type>
using element_t = typename Type::type;

// Calls f with the Types of two kinds of elements that are computed in the same; other pairs never come here.
template <class F>
INTI_INLINE void by_two_dtypes(DType first, DType second, const F& f) {
  by_dtype(first, [&](auto a) {
    using Wide = wide_t<element_t<decltype(a)>>;
    by_dtype(second, [&](auto b) {
      if constexpr (sizeof(wide_t<element_t<decltype(b)>>) == sizeof(Wide)) f(a, b);
    });
  });
}

// Likewise where both are computed in float.
template <class F>
INTI_INLINE void by_narrow_dtypes(DType first, DType second, const F& f) {
  by_two_dtypes(first, second, [&](auto a, auto b) {
    if constexpr (sizeof(wide_t<element_t<decltype(a)>>) == sizeof(float)) f(a, b);
  });
}

// Calls f with the Types of a network's numbers and of those that go through its products: the same, or what they are
// computed in.
template <class F>
INTI_INLINE void by_network(DType network, DType product, const F& f) {
  by_dtype(network, [&](auto type) {
    if (product == network)
      f(type, type);
    else
      f(type, Type<wide_t<element_t<decltype(type)>>>{});
  });
}

}  // namespace
}  // namespace inti::INTI_ISA
