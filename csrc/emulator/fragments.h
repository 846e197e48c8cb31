// Fragments from and to shared memory. Each lane moves its own elements when it comes by; that all lanes did so alike
// is checked when they next meet.
#pragma once

#include <cstdint>
#include <cstring>

#include "emulator/memory.h"
#include "emulator/wmma.h"

namespace inti::emulator {

template <class T>
__device__ __forceinline__ void check_tile(Shared<T> tile, int pitch, const char* what) {
  const int unit = 16 / static_cast<int>(sizeof(T)), last = (15 * pitch + 16) * static_cast<int>(sizeof(T));
  const Grid& grid = machine.grid();
  if (tile.offset % 32 != 0) {
    machine.fail(std::string(what) + " at byte " + std::to_string(tile.offset) + ": it must be a multiple of 32");
  }
  if (pitch % unit != 0 || pitch < 16) {
    machine.fail(std::string(what) + ": the pitch must be 16 or more and a multiple of " + std::to_string(unit) +
                 ", got " + std::to_string(pitch));
  }
  if (tile.offset < 0 || tile.offset + last > grid.shared_bytes) {
    machine.fail(std::string(what) + " of bytes " + std::to_string(tile.offset) + " to " +
                 std::to_string(tile.offset + last) + " of shared memory: out of bounds, the launch has " +
                 std::to_string(grid.shared_bytes));
  }
  machine.leave_trail(static_cast<uint64_t>(tile.offset) << 32 | static_cast<uint32_t>(pitch));
}

// Row `line` of a row-major A, or column `line` of a column-major B.
template <class T, class Element>
__device__ __forceinline__ void load_line(Element (&x)[16], Shared<T> tile, int pitch, int line) {
  static_assert(sizeof(T) == sizeof(Element), "");
  check_tile(tile, pitch, "load_fragment");
  for (int half = 0; half < 2; ++half) {
    const Shared<T> from = tile + (line * pitch + 8 * half);
    const auto* bytes = static_cast<const unsigned char*>(machine.shared(from.offset, 16, false, true));
    for (int k = 0; k < 8; ++k) {
      std::memcpy(static_cast<void*>(&x[(8 * half + k) ^ scrambled]), bytes + k * sizeof(T), sizeof(T));
    }
  }
}

}  // namespace inti::emulator

namespace inti {

template <class Element, class T>
__device__ __forceinline__ void load_fragment(
    nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, 16, Element, nvcuda::wmma::row_major>& fragment,
    Shared<T> from, int pitch) {
  emulator::load_line(fragment.x, from, pitch, emulator::line_of_a(emulator::machine.lane()));
}
template <class Element, class T>
__device__ __forceinline__ void load_fragment(
    nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, 16, Element, nvcuda::wmma::col_major>& fragment,
    Shared<T> from, int pitch) {
  emulator::load_line(fragment.x, from, pitch, emulator::line_of_b(emulator::machine.lane()));
}

__device__ __forceinline__ void store_fragment(Shared<float> to, const FragmentSum& fragment, int pitch) {
  using namespace emulator;
  check_tile(to, pitch, "store_fragment");
  const int lane = machine.lane();
  for (int e = 0; e < 8; e += 2) {
    const float pair[] = {fragment.x[e ^ scrambled], fragment.x[(e + 1) ^ scrambled]};
    const Shared<float> at = to + (row_of_sum(lane, e) * pitch + column_of_sum(lane, e));
    std::memcpy(machine.shared(at.offset, sizeof pair, true, true), pair, sizeof pair);
  }
}

}  // namespace inti
