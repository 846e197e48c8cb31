// The exact GELU, x·Φ(x), and its slope Φ(x) + x·φ(x), which share one exponential.
#pragma once

#include <cmath>

#include "vec.h"

namespace inti::INTI_ISA {
namespace {

// The normal distribution: Φ(x) and φ(x).
template <class A>
struct Normal {
  Vec<A> cdf, density;
};

// The number without its last 12 bits: its square, and a product of two such, is exact.
INTI_INLINE Vec<float> upper_half(const Vec<float>& x) { return bits_as<Vec<float>>(bits_as<Uint32s>(x) & 0xfffff000); }

// c - a·b, rounded once: what is left of a product or a quotient that was rounded.
INTI_INLINE Vec<float> less_product(const Vec<float>& c, const Vec<float>& a, const Vec<float>& b) {
  // By name: with c = a·b the compiler would take the rounded product for both.
#if defined(__AVX512F__)
  return _mm512_fnmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fnmadd_ps(a, b, c);
#else
  // In halves of 12 bits, whose products are exact.
  const Vec<float> a1 = upper_half(a), b1 = upper_half(b), a2 = a - a1, b2 = b - b1;
  return (c - a1 * b1) - a1 * b2 - a2 * b1 - a2 * b2;
#endif
}

// 2^n·(1 + large + small), with `large` exact and `small` rounded where it is small.
struct Power {
  Vec<float> large, small, scale;  // scale: 2^n
};

// exp(high + low) for high in [-87, 0] and a small low: an argument in two parts loses no digits where it is large.
INTI_INLINE Power exponential(const Vec<float>& high, const Vec<float>& low) {
  const float magic = 0x1.8p23f;  // added, it leaves the nearest integer in the lowest bits
  const Vec<float> shifted = high * 0x1.715476p0f + magic, n = shifted - magic;
  // ln 2 as 0x1.62ep-1, of which n multiples are exact, and the rest.
  const Vec<float> large = high - n * 0x1.62ep-1f, rest = low - n * 0x1.0bfbe8p-15f, r = large + rest;
  Vec<float> q = r * 0x1.6a3d7ap-10f + 0x1.1239ep-7f;
  q = q * r + 0x1.5558cp-5f;
  q = q * r + 0x1.555492p-3f;
  q = q * r + 0x1.fffffcp-2f;
  return {large, r * r * q + rest, bits_as<Vec<float>>((bits_as<Uint32s>(shifted) + 127) << 23)};
}

// Φ(-t) = exp(-t²/2)·R(t) for t ≥ 0, with R(t)·(1 + t/4) a polynomial in w = 1 / (1 + t/4): both tails keep their
// digits, which 1 + erf would lose. What its steps of full size round off is put right at the end. Φ and φ are within
// 2 ulp where they are normal numbers (Φ within 1.3 above 0); from -13 on both are 0. NaN stays NaN.
//
// Not kExact leaves that out: Φ and φ are within 2^-17 of themselves, far below what a network of 16 bits rounds off.
template <bool kExact>
INTI_INLINE Normal<float> normal(const Vec<float>& x) {
  Vec<float> t = bits_as<Vec<float>>(bits_as<Uint32s>(x) & 0x7fffffff);
  t = t > 14.0f ? Vec<float>{} + 14.0f : t;  // a comparison with NaN is false
  // If exact: the square of 12 bits is, and the rest is the small part.
  const Vec<float> high = kExact ? upper_half(t) : t;
  const Power e = exponential(-0.5f * high * high, kExact ? -0.5f * (t - high) * (t + high) : Vec<float>{});
  const Vec<float> scale = t > 13.0f ? Vec<float>{} : e.scale;

  const Vec<float> d = 0.25f * t + 1.0f, w = 1.0f / d, v = w - 0x1.f3p-2f;
  Vec<float> ratio = v * 0x1.0a87c4p-6f + 0x1.598b68p-7f;
  ratio = ratio * v - 0x1.a8236ep-5f;
  ratio = ratio * v - 0x1.a77ee6p-5f;
  ratio = ratio * v + 0x1.07a622p-4f;
  ratio = ratio * v + 0x1.e6b75cp-3f;
  ratio = ratio * v + 0x1.718928p-2f;
  ratio = ratio * v + 0x1.7e1e1cp-2f;
  const Vec<float> inner = ratio * v + 0x1.2d5c36p-2f, sum = inner * v + 0x1.7aedf8p-3f;
  const Vec<float> r = sum * w, more = e.large + e.small, power = more + 1.0f;
  Vec<float> tail = r * power * scale;
  if constexpr (kExact) {
    // What is missing to the two sums; to w as a share, of which R has 0.66 + 2.41·w times as much; and to R.
    const Vec<float> of_sum = v * (0x1.2d5c36p-2f - inner + ratio * v) - less_product(sum - 0x1.7aedf8p-3f, inner, v);
    const Vec<float> of_w = less_product(Vec<float>{} + 1.0f, d, w) - (0.25f * t - (d - 1.0f)) * w;
    const Vec<float> of_r = r * ((w * 2.41f + 0.66f) * of_w) + (of_sum * w - less_product(r, sum, w));
    tail = (of_r * power + r * more + r) * scale;
  }
  return {bits_as<Int32s>(x) < 0 ? tail : 1.0f - tail, power * scale * 0x1.988454p-2f};
}

template <bool>
INTI_INLINE Normal<double> normal(const Vec<double>& x) {
  Normal<double> at;
  for (int i = 0; i < kLanes<double>; ++i) {
    at.cdf[i] = 0.5 * std::erfc(-0.70710678118654752440 * x[i]);
    at.density[i] = 0.39894228040143267794 * std::exp(-0.5 * x[i] * x[i]);
  }
  return at;
}

template <class A>
struct Gelu {
  Vec<A> value, slope;
};

// N is the network's dtype.
template <class N>
INTI_INLINE Gelu<wide_t<N>> gelu(const Vec<wide_t<N>>& x) {
  const Normal<wide_t<N>> at = normal<sizeof(N) == sizeof(wide_t<N>)>(x);
  return {x * at.cdf, at.cdf + x * at.density};
}

}  // namespace
}  // namespace inti::INTI_ISA
