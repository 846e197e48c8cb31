// CUDA's half and bfloat16: storage, conversions, and arithmetic rounded as the device rounds it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace inti::emulator {

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7fff;
  // A subnormal is a whole number of 2^-24; elsewhere the exponents' biases differ by 112, and infinity by twice that.
  const uint32_t subnormal = bits_as<uint32_t>(static_cast<float>(static_cast<int>(rest)) * 0x1p-24f);
  const uint32_t normal = (rest << 13) + (rest >= 0x7c00 ? 0x70000000u : 0x38000000u);
  return bits_as<float>(sign | (rest < 0x0400 ? subnormal : normal));
}

// To nearest, ties to even.
inline uint16_t float_to_half(float value) {
  const uint32_t bits = bits_as<uint32_t>(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return 0x7fff;
  uint32_t half;
  if (rest < 0x38800000) {
    // Below 2^-14: 0.5 has the unit 2^-24, so that the sum is rounded as a subnormal half is.
    half = bits_as<uint32_t>(bits_as<float>(rest) + 0.5f) - 0x3f000000;
  } else if (rest < 0x47800000) {
    half = (rest - 0x38000000 + 0x0fff + (rest >> 13 & 1)) >> 13;
  } else {
    half = 0x7c00;
  }
  return static_cast<uint16_t>(sign | half);
}

inline float bfloat16_to_float(uint16_t bfloat) { return bits_as<float>(static_cast<uint32_t>(bfloat) << 16); }

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// a·b + c for products that are exact in a double, as a float that rounds on to 16 bits as the exact sum would: to odd,
// so that what was lost can't pass for a tie.
inline float product_sum(float a, float b, float c) {
  const double product = static_cast<double>(a) * b, sum = product + c;
  if (!std::isfinite(sum)) return static_cast<float>(sum);
  const double from_c = sum - product, lost = (product - (sum - from_c)) + (c - from_c);
  const auto to_odd = [](double rounded, double more) {
    if (more == 0 || (bits_as<uint64_t>(rounded) & 1)) return rounded;
    return std::nextafter(rounded, more > 0 ? INFINITY : -INFINITY);
  };
  const double odd = to_odd(sum, lost);
  const float near = static_cast<float>(odd);
  if (near == odd || (bits_as<uint32_t>(near) & 1) || !std::isfinite(near)) return near;
  return std::nextafter(near, odd > near ? INFINITY : -INFINITY);
}

}  // namespace inti::emulator

struct __half {
  uint16_t bits;
  __half() = default;
  __half(float value) : bits(inti::emulator::float_to_half(value)) {}
  operator float() const { return inti::emulator::half_to_float(bits); }
};
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float value) : bits(inti::emulator::float_to_bfloat16(value)) {}
  operator float() const { return inti::emulator::bfloat16_to_float(bits); }
};
struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __half2float(__half value) { return value; }
inline __half __float2half(float value) { return value; }
inline __half __float2half_rn(float value) { return value; }
inline __half __ushort_as_half(unsigned short bits) { return inti::emulator::bits_as<__half>(bits); }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 value) { return {value.x, value.y}; }
inline float2 __half22float2(__half2 value) { return {value.x, value.y}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline float __low2float(__half2 value) { return value.x; }
inline float __high2float(__half2 value) { return value.y; }
inline __half __low2half(__half2 value) { return value.x; }
inline __half __high2half(__half2 value) { return value.y; }

inline float __bfloat162float(__nv_bfloat16 value) { return value; }
inline __nv_bfloat16 __float2bfloat16(float value) { return value; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return value; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return inti::emulator::bits_as<__nv_bfloat16>(bits); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 value) { return {value.x, value.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 value) { return {value.x, value.y}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline float __low2float(__nv_bfloat162 value) { return value.x; }
inline float __high2float(__nv_bfloat162 value) { return value.y; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 value) { return value.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 value) { return value.y; }

// A float has more than twice the bits of either and two more, so that rounding sums, products and quotients twice is
// rounding once.
inline __half __hadd(__half a, __half b) { return float(a) + float(b); }
inline __half __hsub(__half a, __half b) { return float(a) - float(b); }
inline __half __hmul(__half a, __half b) { return float(a) * float(b); }
inline __half __hdiv(__half a, __half b) { return float(a) / float(b); }
inline __half __hneg(__half a) { return __ushort_as_half(a.bits ^ 0x8000); }
inline __half __hfma(__half a, __half b, __half c) { return inti::emulator::product_sum(a, b, c); }
inline __nv_bfloat16 __hadd(__nv_bfloat16 a, __nv_bfloat16 b) { return float(a) + float(b); }
inline __nv_bfloat16 __hsub(__nv_bfloat16 a, __nv_bfloat16 b) { return float(a) - float(b); }
inline __nv_bfloat16 __hmul(__nv_bfloat16 a, __nv_bfloat16 b) { return float(a) * float(b); }
inline __nv_bfloat16 __hdiv(__nv_bfloat16 a, __nv_bfloat16 b) { return float(a) / float(b); }
inline __nv_bfloat16 __hneg(__nv_bfloat16 a) { return __ushort_as_bfloat16(a.bits ^ 0x8000); }
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  return inti::emulator::product_sum(a, b, c);
}
inline __half2 __hadd2(__half2 a, __half2 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }
inline __half2 __hmul2(__half2 a, __half2 b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }

inline __half operator+(__half a, __half b) { return __hadd(a, b); }
inline __half operator-(__half a, __half b) { return __hsub(a, b); }
inline __half operator*(__half a, __half b) { return __hmul(a, b); }
inline __half operator/(__half a, __half b) { return __hdiv(a, b); }
inline __nv_bfloat16 operator+(__nv_bfloat16 a, __nv_bfloat16 b) { return __hadd(a, b); }
inline __nv_bfloat16 operator-(__nv_bfloat16 a, __nv_bfloat16 b) { return __hsub(a, b); }
inline __nv_bfloat16 operator*(__nv_bfloat16 a, __nv_bfloat16 b) { return __hmul(a, b); }
inline __nv_bfloat16 operator/(__nv_bfloat16 a, __nv_bfloat16 b) { return __hdiv(a, b); }
