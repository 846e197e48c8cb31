// nvcuda::wmma: 16×16×16 products by a warp. Loading and storing fragments is in fragments.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator/machine.h"
#include "emulator/numbers.h"

namespace nvcuda::wmma {

struct row_major;
struct col_major;
struct matrix_a;
struct matrix_b;
struct accumulator;
enum layout_t { mem_row_major, mem_col_major };

// Starts as NaN. As on Volta, each element of A and B is in two lanes.
template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  static_assert(M == 16 && N == 16 && K == 16, "the emulator has 16×16×16 only");
  static constexpr int num_elements = std::is_same_v<Use, accumulator> ? 8 : 16;
  fragment() { std::memset(static_cast<void*>(x), 0xff, sizeof x); }
  T x[num_elements];
};

template <class Use, class T, class Layout, class Value>
inline void fill_fragment(fragment<Use, 16, 16, 16, T, Layout>& fragment, Value value) {
  for (T& x : fragment.x) x = static_cast<T>(value);
}

}  // namespace nvcuda::wmma

namespace inti::emulator {

// Where a lane's elements lie: what is known of Volta's layout but for the order within a lane, so that code which
// takes that one, or any other, for granted goes wrong. Element i is the i ^ scrambled'th.
inline constexpr int scrambled = 5;

// The row of A or the column of B that a lane has all of.
inline int line_of_a(int lane) { return (lane & 3) | (lane >> 2 & 4) | (lane << 1 & 8); }
inline int line_of_b(int lane) { return (lane & 3) | (lane >> 2 & 4) | (lane & 8); }
// A lane that has it.
inline int lane_of_a(int line) { return (line & 3) | (line << 2 & 16) | (line >> 1 & 4); }
inline int lane_of_b(int line) { return (line & 3) | (line << 2 & 16) | (line & 8); }
// Of the accumulator's e'th element before scrambling.
inline int row_of_sum(int lane, int e) { return (lane & 1) | (e & 2) | (lane >> 2 & 4) | (lane << 1 & 8); }
inline int column_of_sum(int lane, int e) { return (e & 1) | (lane & 2) | (e & 4) | (lane & 8); }

// Four numbers at once in every build, optimised or not.
typedef float Floats __attribute__((vector_size(16)));
typedef int Ints __attribute__((vector_size(16)));

inline Floats widen(const __half* from) {
  typedef uint16_t Halves __attribute__((vector_size(8)));
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  const Ints bits = __builtin_convertvector(halves, Ints), rest = bits & 0x7fff;  // see half_to_float
  const Ints subnormal = (Ints)(__builtin_convertvector(rest, Floats) * 0x1p-24f);
  const Ints normal = (rest << 13) + ((rest >= 0x7c00) & 0x38000000) + 0x38000000;
  const Ints small = rest < 0x0400;
  return (Floats)((bits & 0x8000) << 16 | (small & subnormal) | (~small & normal));
}
inline Floats widen(const __nv_bfloat16* from) { return Floats{from[0], from[1], from[2], from[3]}; }

// d = a·b + c. Products of 16-bit numbers are exact in float; they are summed in float, from c on, in the (scrambled)
// order of k.
template <class A, class B, class C, class D>
__attribute__((noinline, no_profile_instrument_function)) void multiply(Warp& warp) {
  alignas(16) float a[16][16], b[16][16], sums[16][16];  // [m, k], [k, n], [m, n]
  for (int line = 0; line < 16; ++line) {
    const A* of_a = static_cast<const A*>(warp.operands[lane_of_a(line)][1]);
    const B* of_b = static_cast<const B*>(warp.operands[lane_of_b(line)][2]);
    for (int k = 0; k < 16; k += 4) {
      *reinterpret_cast<Floats*>(&a[line][k]) = widen(of_a + k);
      const Floats column = widen(of_b + k);
      for (int i = 0; i < 4; ++i) b[k + i][line] = column[i];
    }
  }
  for (int lane = 0; lane < warp_lanes; ++lane) {
    const C* c = static_cast<const C*>(warp.operands[lane][3]);
    for (int e = 0; e < 8; ++e) {
      sums[row_of_sum(lane, e)][column_of_sum(lane, e)] = static_cast<float>(c[e ^ scrambled]);
    }
  }
  for (int m = 0; m < 16; ++m) {
    Floats* row = reinterpret_cast<Floats*>(sums[m]);
    Floats s0 = row[0], s1 = row[1], s2 = row[2], s3 = row[3];
    for (int k = 0; k < 16; ++k) {
      const Floats* other = reinterpret_cast<const Floats*>(b[k]);
      const float factor = a[m][k];
      s0 += factor * other[0];
      s1 += factor * other[1];
      s2 += factor * other[2];
      s3 += factor * other[3];
    }
    row[0] = s0, row[1] = s1, row[2] = s2, row[3] = s3;
  }
  for (int lane = 0; lane < warp_lanes; ++lane) {
    D* d = static_cast<D*>(warp.operands[lane][0]);
    for (int e = 0; e < 8; ++e) d[e ^ scrambled] = static_cast<D>(sums[row_of_sum(lane, e)][column_of_sum(lane, e)]);
  }
}

}  // namespace inti::emulator

namespace nvcuda::wmma {

template <class D, class A, class LayoutA, class B, class LayoutB, class C>
inline void mma_sync(fragment<accumulator, 16, 16, 16, D>& d, const fragment<matrix_a, 16, 16, 16, A, LayoutA>& a,
                     const fragment<matrix_b, 16, 16, 16, B, LayoutB>& b, const fragment<accumulator, 16, 16, 16, C>& c,
                     const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  auto& machine = inti::emulator::machine;
  if (std::is_same_v<A, __nv_bfloat16> && machine.compute_capability < 80) {
    machine.fail("mma_sync of bfloat16 needs compute capability 8.0");
  }
  void** operands = machine.warp().operands[machine.lane()];
  operands[0] = d.x;
  operands[1] = const_cast<A*>(a.x);
  operands[2] = const_cast<B*>(b.x);
  operands[3] = const_cast<C*>(c.x);
  machine.meet(inti::emulator::Meeting::mma, inti::emulator::all_lanes, {file, line},
               &inti::emulator::multiply<A, B, C, D>);
}

}  // namespace nvcuda::wmma
