// half and bfloat16 against arithmetic that shares nothing with the emulator's: exact sums and products, rounded by
// nearbyintl (to nearest, ties to even) in units of the result's last place.
#include <cfloat>
#include <cmath>
#include <random>

#include "harness.h"

namespace testing {

using namespace inti;

struct Format {
  int digits, lowest;  // of the significand, with its leading 1; exponent of the smallest normal number
  long double largest;
};
constexpr Format half_format{11, -14, 65504.0L}, bfloat_format{8, -126, 0x1.fep127L};

long double rounded(long double exact, Format format) {
  if (!(std::fabs(exact) <= LDBL_MAX) || exact == 0) return exact;
  const long double unit = std::ldexp(1.0L, std::max(std::ilogb(exact), format.lowest) - format.digits + 1);
  const long double result = std::nearbyintl(exact / unit) * unit;
  if (std::fabs(result) > format.largest) return std::copysign(INFINITY, exact);
  return std::copysign(result, exact);
}

// A number by its sign, exponent and fraction.
long double decoded(unsigned bits, Format format) {
  const int fraction_bits = format.digits - 1;
  const long double sign = bits & 0x8000 ? -1.0L : 1.0L, fraction = bits & ((1u << fraction_bits) - 1);
  const int exponent = static_cast<int>((bits & 0x7fff) >> fraction_bits), top = (1 << (15 - fraction_bits)) - 1;
  if (exponent == top) return fraction != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, format.lowest - fraction_bits);
  return sign * std::ldexp(fraction + (1 << fraction_bits), format.lowest + exponent - 1 - fraction_bits);
}

void same(long double value, long double expected, const char* what) {
  const bool equal =
      std::isnan(expected) ? std::isnan(value) : value == expected && std::signbit(value) == std::signbit(expected);
  if (!equal) {
    expect(false, what + (" gave " + std::to_string(value)) + " in the place of " + std::to_string(expected));
  }
}

template <class T>
constexpr Format format = std::is_same_v<T, __half> ? half_format : bfloat_format;
template <class T>
T from_bits(unsigned bits) {
  return emulator::bits_as<T>(static_cast<uint16_t>(bits));
}

template <class T>
void check_conversions() {
  constexpr Format f = format<T>;
  using Ours = std::conditional_t<std::is_same_v<T, __half>, float16, bfloat16>;
  const auto narrowed = [&](float value) {
    const long double expected = std::isnan(value) ? NAN : rounded(value, f);
    same(decoded(T(value).bits, f), expected, "rounding");
    same(decoded(narrow<Ours>(value).bits, f), expected, "rounding as device.h does it");
  };
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    const float value = from_bits<T>(bits);
    same(value, decoded(bits, f), "widening");
    same(widen(Ours{static_cast<unsigned short>(bits)}), value, "widening by device.h");
    if (!std::isnan(value)) expect(T(value).bits == bits, "there and back is another number");
    // What lies half way to the next one, and just beside it.
    const float next = from_bits<T>(bits + 1 < 0x10000 ? bits + 1 : 0);
    const float middle = static_cast<float>((static_cast<long double>(value) + next) / 2);
    for (float near : {value, middle, std::nextafter(middle, -INFINITY), std::nextafter(middle, INFINITY)})
      narrowed(near);
  }
  std::mt19937 random(1);
  for (int i = 0; i < 50000; ++i) narrowed(emulator::bits_as<float>(static_cast<uint32_t>(random())));
  for (float edge : {65504.0f, 65519.99f, 65520.0f, 0x1p-24f, 0x1p-25f, 0x1.000002p-25f, FLT_MAX, FLT_MIN, 1e-45f}) {
    narrowed(edge);
    narrowed(-edge);
  }
}
const Add half_conversions("half_conversions", &check_conversions<__half>);
const Add bfloat_conversions("bfloat16_conversions", &check_conversions<__nv_bfloat16>);

// a + b rounded once. Where the sum doesn't fit a long double, what fits is on the same side of every tie, unless it is
// a tie itself.
long double rounded_sum(long double a, long double b, Format format) {
  const long double sum = a + b, from_b = sum - a, lost = (a - (sum - from_b)) + (b - from_b);
  if (!std::isfinite(sum) || lost == 0) return rounded(sum, format);
  const long double up = std::nextafter(sum, INFINITY), down = std::nextafter(sum, -INFINITY);
  const bool tie = rounded(up, format) != rounded(down, format);
  return rounded(tie && std::fabs(rounded(up, format) - sum) == std::fabs(rounded(down, format) - sum)
                     ? (lost > 0 ? up : down)
                     : sum,
                 format);
}

template <class T>
void check_arithmetic() {
  constexpr Format f = format<T>;
  std::mt19937 random(2);
  const auto any = [&] {
    const unsigned bits = random();
    if (bits >> 16 & 1) return from_bits<T>(bits & 0xffff);
    return from_bits<T>((bits & 0x80ff) | (f.digits == 11 ? 0x3c00 : 0x3f80) | (bits >> 20 & 0x300));  // near 1
  };
  for (int i = 0; i < 50000; ++i) {
    const T a = any(), b = any(), c = any();
    const long double wide_a = float(a), wide_b = float(b), wide_c = float(c);
    same(decoded((a + b).bits, f), rounded_sum(wide_a, wide_b, f), "a sum");
    same(decoded((a - b).bits, f), rounded_sum(wide_a, -wide_b, f), "a difference");
    same(decoded((a * b).bits, f), rounded(wide_a * wide_b, f), "a product");
    same(decoded((a / b).bits, f), rounded(wide_a / wide_b, f), "a quotient");
    same(decoded(__hfma(a, b, c).bits, f), rounded_sum(wide_a * wide_b, wide_c, f), "a fused product and sum");
    same(decoded(__hneg(a).bits, f), -wide_a, "a negative");
  }
  // A tie but for a term that no float, and no double either, could hold beside it.
  const T one(1.0f), above(1.0f + std::ldexp(1.0f, 1 - f.digits)), half_unit(std::ldexp(1.0f, -f.digits));
  const T tiny(f.digits == 11 ? 0x1p-24f : 0x1p-100f);
  expect(float(__hfma(one, one, half_unit)) == 1.0f, "a tie goes to even");
  expect(float(__hfma(above, above, tiny)) == float(T(float(above) * float(above))), "no tie");
}
const Add half_arithmetic("half_arithmetic", &check_arithmetic<__half>);
const Add bfloat_arithmetic("bfloat16_arithmetic", &check_arithmetic<__nv_bfloat16>);

// (1 + 2^-4)² = 1 + 2^-3 + 2^-8 lies half way between two bfloat16s.
const Add lost_term("bfloat16_tie_and_a_lost_term", [] {
  const __nv_bfloat16 factor(1.0625f), tiny(0x1p-100f), minus_tiny(-0x1p-100f), zero(0.0f);
  expect(float(__hfma(factor, factor, zero)) == 1.125f, "the tie goes to even");
  expect(float(__hfma(factor, factor, tiny)) == 1.1328125f, "above the tie it goes up");
  expect(float(__hfma(factor, factor, minus_tiny)) == 1.125f, "below the tie it goes down");
});

const Add pairs("pairs_of_numbers", [] {
  const float2 halves = __half22float2(__hfma2(__floats2half2_rn(1.5f, -2.0f), __float22half2_rn({2.0f, 3.0f}),
                                               __halves2half2(__float2half(0.25f), __ushort_as_half(0x3c00))));
  expect(halves.x == 3.25f && halves.y == -5.0f, "halves");
  const __nv_bfloat162 pair = __floats2bfloat162_rn(1.0f, __bfloat162float(__ushort_as_bfloat16(0x4000)));
  const float2 bfloats = __bfloat1622float2(__halves2bfloat162(__high2bfloat16(pair), __low2bfloat16(pair)));
  expect(bfloats.x == 2.0f && bfloats.y == 1.0f, "bfloat16s");
  expect(__half_as_ushort(__float2half_rn(NAN)) == 0x7fff && narrow<bfloat16>(NAN).bits == 0x7fff, "NaN");
});

const Add bits("bits_of_floats", [] {
  expect(__float_as_uint(1.0f) == 0x3f800000u && __uint_as_float(0xbf800000u) == -1.0f, "float and unsigned");
  expect(__popc(0xf0u) == 4 && __clz(1) == 31 && __clz(0) == 32 && __ffs(8) == 4, "counts of bits");
  expect(rsqrtf(4.0f) == 0.5f && rsqrt(16.0) == 0.25 && min(2, 3) == 2 && max(2.0f, 3.0f) == 3.0f, "functions");
});

}  // namespace testing
