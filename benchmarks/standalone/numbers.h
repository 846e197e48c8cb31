// Numbers as they lie in memory, and how far arithmetic may take them from the truth. Written apart from the kernels'
// own conversions, which it checks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "inti/types.h"

namespace standalone {

using inti::DType;

struct Format {
  const char* name;
  int bytes;
  int digits;    // of the significand, behind the point
  int exponent;  // least of a normal number
};

inline const Format& format_of(DType dtype) {
  static const Format float32{"float32", 4, 23, -126}, float64{"float64", 8, 52, -1022},
      bfloat16{"bfloat16", 2, 7, -126}, float16{"float16", 2, 10, -14};
  switch (dtype) {
    case DType::float32:
      return float32;
    case DType::float64:
      return float64;
    case DType::bfloat16:
      return bfloat16;
    case DType::float16:
      return float16;
  }
  throw std::invalid_argument("unknown dtype");
}

inline DType wide_of(DType dtype) { return dtype == DType::float64 ? dtype : DType::float32; }

// Half the distance of 1 to the next number: the largest relative error of rounding. In float64 the loops that say what
// is right round as well, so that two roundings meet.
inline double rounding_of(DType dtype) {
  return std::ldexp(dtype == DType::float64 ? 2.0 : 1.0, -1 - format_of(dtype).digits);
}

// The least number above 0.
inline double least_of(DType dtype) { return std::ldexp(1.0, format_of(dtype).exponent - format_of(dtype).digits); }

// To the nearest number of the dtype, ties to even; 16-bit formats are cut out of the double's digits. The value must
// lie in the dtype's range.
inline void encode(double value, DType dtype, void* to) {
  if (dtype == DType::float64) {
    std::memcpy(to, &value, 8);
    return;
  }
  if (dtype == DType::float32) {
    const float narrow = static_cast<float>(value);
    std::memcpy(to, &narrow, 4);
    return;
  }
  const Format& format = format_of(dtype);
  const double magnitude = std::fabs(value);
  int exponent = magnitude > 0 ? std::ilogb(magnitude) : format.exponent;
  if (exponent < format.exponent) exponent = format.exponent;
  const int64_t units = std::llrint(std::ldexp(magnitude, format.digits - exponent));
  // A significand that carries over adds one to the exponent above it, as it should.
  const int64_t one = int64_t{1} << format.digits;
  const int64_t bits = units < one ? units : (exponent - format.exponent) * one + units;
  const uint16_t word = static_cast<uint16_t>((std::signbit(value) ? 0x8000 : 0) | bits);
  std::memcpy(to, &word, 2);
}

inline double decode(const void* from, DType dtype) {
  if (dtype == DType::float64) {
    double value;
    std::memcpy(&value, from, 8);
    return value;
  }
  if (dtype == DType::float32) {
    float value;
    std::memcpy(&value, from, 4);
    return value;
  }
  const Format& format = format_of(dtype);
  uint16_t word;
  std::memcpy(&word, from, 2);
  const int field = (word & 0x7fff) >> format.digits, fraction = word & ((1 << format.digits) - 1);
  const double sign = word & 0x8000 ? -1 : 1;
  if (field == 0x7fff >> format.digits) return fraction ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  const int implied = field > 0 ? 1 << format.digits : 0;
  return sign * std::ldexp(implied + fraction, (field > 0 ? field - 1 : 0) + format.exponent - format.digits);
}

inline double rounded(double value, DType dtype) {
  unsigned char word[8];
  encode(value, dtype, word);
  return decode(word, dtype);
}

// A number and how far a computation in W's precision may have come from it: the usual running error analysis, to first
// order. Only what the loops need.
struct Bounded {
  double value = 0, error = 0;
};

// Arithmetic in one precision.
struct Arithmetic {
  double u;      // relative error of an operation
  double least;  // absolute error of one that underflows

  explicit Arithmetic(DType wide) : u(rounding_of(wide)), least(least_of(wide)) {}

  Bounded exact(double value) const { return {value, 0}; }
  Bounded round(double value, double error, double operations = 1) const {
    return {value, error + operations * u * (std::fabs(value) + error) + least};
  }
  Bounded add(Bounded a, Bounded b) const { return round(a.value + b.value, a.error + b.error); }
  Bounded subtract(Bounded a, Bounded b) const { return round(a.value - b.value, a.error + b.error); }
  Bounded multiply(Bounded a, Bounded b) const {
    return round(a.value * b.value, std::fabs(a.value) * b.error + std::fabs(b.value) * a.error + a.error * b.error);
  }

  // GELU and its slope: |GELU'| ≤ 1.13 and |GELU''| ≤ 0.8 carry the argument's error on. erf and exp are good to two
  // units in the last place, four roundings, and 1 + erf cancels for negative arguments, so the error is relative to
  // the argument, not to the result; the slope's, with its exponential of -v²/2, is relative to 1.
  Bounded gelu(Bounded v) const {
    return {0.5 * v.value * std::erfc(-v.value * std::sqrt(0.5)), 1.13 * v.error + 6 * u * std::fabs(v.value) + least};
  }
  Bounded gelu_slope(Bounded v) const {
    const double density = std::exp(-0.5 * v.value * v.value) * 0.3989422804014327;
    return {0.5 * std::erfc(-v.value * std::sqrt(0.5)) + v.value * density, 0.8 * v.error + 8 * u};
  }
  // 1/(1 + e^-v), by a difference of two logits or two exponentials: about eight roundings, and the argument's error.
  Bounded sigmoid(Bounded v) const {
    const double value = 1 / (1 + std::exp(-v.value)), slope = value / (1 + std::exp(v.value));
    return round(value, slope * v.error, 8);
  }
};

// A sum in an unknown order. Its bound is 4·√n·u·Σ|term|, beside the terms' own errors at their worst: roundings of n
// additions act as if independent, so that what they add up to grows as √n, and four such deviations don't happen. The
// bound that holds for any roundings has n in the place of √n, and would let a missing term pass.
struct Sum {
  double value = 0, magnitude = 0, error = 0;
  int64_t terms = 0;

  void add(Bounded term) {
    value += term.value;
    magnitude += std::fabs(term.value);
    error += term.error;
    ++terms;
  }
  void add_product(double a, double b) {
    const double product = a * b;
    value += product;
    magnitude += std::fabs(product);
    ++terms;
  }
  Bounded total(const Arithmetic& with) const {
    return {value, error + 4 * std::sqrt(static_cast<double>(terms)) * with.u * magnitude + with.least};
  }
};

// A result that was stored as dtype.
inline Bounded stored(Bounded number, DType dtype) {
  number.error += rounding_of(dtype) * (std::fabs(number.value) + number.error) + least_of(dtype);
  return number;
}

}  // namespace standalone
