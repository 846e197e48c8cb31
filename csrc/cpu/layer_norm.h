// A row's mean and 1/σ.
#pragma once

#include "rows.h"

namespace inti::INTI_ISA {
namespace {

template <class A>
struct Statistics {
  A mean, scale;  // scale: 1/σ
};

// at(c, load) is the row's vector at channel c, `load` the one that for_each_vector gives.
template <class T, class Row>
INTI_INLINE Statistics<wide_t<T>> statistics_of(const Row& at, int64_t dim, double eps) {
  using A = wide_t<T>;
  // Two sums side by side hide the addition's latency.
  Vec<A> sums[2] = {}, rests[2] = {}, squares[2] = {};
  int64_t i = 0;
  for_each_vector<T>(dim,
                     [&](int64_t c, auto load, auto) __attribute__((always_inline)) { sums[i++ & 1] += at(c, load); });
  const A mean = sum_lanes<A>(sums[0] + sums[1]) / A(dim);
  for_each_vector<T>(dim, [&](int64_t c, auto load, auto) __attribute__((always_inline)) {
    const Vec<A> off = inside<A>(load, at(c, load) - mean);
    rests[i & 1] += off;
    squares[i++ & 1] += off * off;
  });
  // What is left of the sum without the mean is what its rounding has lost: much, where all channels are far from 0.
  const A rest = sum_lanes<A>(rests[0] + rests[1]) / A(dim);
  const A variance = sum_lanes<A>(squares[0] + squares[1]) / A(dim);
  return {mean + rest, A(1 / __builtin_sqrt(double(variance) + eps))};
}

}  // namespace
}  // namespace inti::INTI_ISA
