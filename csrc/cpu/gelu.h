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

// exp(high + low) for high in [-87, 0] and a small low: an argument in two parts loses no digits where it is large.
// Within 2 ulp.
INTI_INLINE Vec<float> exponential(const Vec<float>& high, const Vec<float>& low) {
  const float magic = 0x1.8p23f;  // added, it leaves the nearest integer in the lowest bits
  const Vec<float> shifted = high * 0x1.715476p0f + magic, n = shifted - magic;
  // ln 2 as 0x1.62ep-1, of which n multiples are exact, and the rest.
  const Vec<float> r = (high - n * 0x1.62ep-1f) - n * 0x1.0bfbe8p-15f + low;
  Vec<float> q = r * 0x1.698248p-10f + 0x1.129cp-7f;
  q = q * r + 0x1.555bb6p-5f;
  q = q * r + 0x1.5553fap-3f;
  q = q * r + 0x1.fffff6p-2f;
  const Vec<float> power = r * r * q + r + 1.0f;
  return power * bits_as<Vec<float>>((bits_as<Uint32s>(shifted) + 127) << 23);
}

// Φ(-t) = exp(-t²/2)·R(t) for t ≥ 0, with R(t)·(1 + 0.4·t) a polynomial in u = 0.4·t / (1 + 0.4·t): both tails keep
// their digits, which 1 + erf would lose. φ is within 2 ulp, Φ within 2 above 0 and 10 below; from -13 on both are 0.
// NaN stays NaN.
INTI_INLINE Normal<float> normal(const Vec<float>& x) {
  Vec<float> t = bits_as<Vec<float>>(bits_as<Uint32s>(x) & 0x7fffffff);
  t = t > 14.0f ? Vec<float>{} + 14.0f : t;  // a comparison with NaN is false
  // The square of 12 bits is exact; the rest is the small part.
  const Vec<float> high = bits_as<Vec<float>>(bits_as<Uint32s>(t) & 0xfffff000);
  Vec<float> e = exponential(-0.5f * high * high, -0.5f * (t - high) * (t + high));
  e = t > 13.0f ? Vec<float>{} : e;
  const Vec<float> u = 0.4f * t / (1.0f + 0.4f * t);
  Vec<float> ratio = u * -0x1.04ffe8p-5f + 0x1.c95fb2p-4f;
  ratio = ratio * u - 0x1.fff3dep-4f;
  ratio = ratio * u + 0x1.c1d4ecp-5f;
  ratio = ratio * u - 0x1.e99e54p-5f;
  ratio = ratio * u + 0x1.6eb25ap-6f;
  ratio = ratio * u + 0x1.de3668p-4f;
  ratio = ratio * u + 0x1.15e228p-4f;
  ratio = ratio * u - 0x1.fd4b2p-2f;
  ratio = ratio * u + 0.5f;
  const Vec<float> tail = e * ((1.0f - u) * ratio);
  return {bits_as<Int32s>(x) < 0 ? tail : 1.0f - tail, e * 0x1.988454p-2f};
}

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

template <class A>
INTI_INLINE Gelu<A> gelu(const Vec<A>& x) {
  const Normal<A> at = normal(x);
  return {x * at.cdf, at.cdf + x * at.density};
}

}  // namespace
}  // namespace inti::INTI_ISA
