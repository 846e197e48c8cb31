// What threads do together: barriers, shuffles, votes; and integer atomics.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "emulator/machine.h"

namespace inti::emulator {

// Every lane brings a value and the number of the lane whose value it wants.
template <class T>
inline T shuffle(Meeting meeting, uint32_t mask, T value, int source, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "shuffles take values of up to 8 bytes");
  const int lane = machine.lane();
  Warp& warp = machine.warp();
  if (!(mask >> source & 1)) {
    machine.fail(std::string(name(meeting)) + "(" + hex(mask) + ") at " + site.words() + ": it reads lane " +
                 std::to_string(source) + ", which is not in the mask");
  }
  std::memcpy(&warp.value[lane], &value, sizeof value);
  warp.source[lane] = source;
  machine.meet(meeting, mask, site, [mask](Warp& warp) {
    for (uint32_t left = mask; left; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      warp.result[lane] = warp.value[warp.source[lane]];
    }
  });
  std::memcpy(&value, &warp.result[lane], sizeof value);
  return value;
}

// The lanes whose predicate holds.
inline uint32_t vote(Meeting meeting, uint32_t mask, bool predicate, Site site) {
  const int lane = machine.lane();
  Warp& warp = machine.warp();
  warp.value[lane] = predicate;
  machine.meet(meeting, mask, site, [mask](Warp& warp) {
    uint64_t ballot = 0;
    for (uint32_t left = mask; left; left &= left - 1) ballot |= warp.value[__builtin_ctz(left)] << __builtin_ctz(left);
    for (uint32_t left = mask; left; left &= left - 1) warp.result[__builtin_ctz(left)] = ballot;
  });
  return static_cast<uint32_t>(warp.result[lane]);
}

template <class T>
inline T fetch_add(T* at, T value) {
  machine.global(at, sizeof(T), false);
  machine.global(at, sizeof(T), true);
  const T before = *at;
  using Unsigned = std::make_unsigned_t<T>;
  *at = static_cast<T>(static_cast<Unsigned>(before) + static_cast<Unsigned>(value));
  return before;
}

}  // namespace inti::emulator

// Default arguments are evaluated at the call: the kernel's line.
inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  inti::emulator::machine.barrier({file, line});
}
inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  inti::emulator::machine.meet(inti::emulator::Meeting::syncwarp, mask, {file, line}, [](auto&) {});
}

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, const char* file = __builtin_FILE(),
                     int line = __builtin_LINE()) {
  const int first = inti::emulator::machine.lane() & ~(width - 1);
  return inti::emulator::shuffle(inti::emulator::Meeting::shfl, mask, value, first + (source & (width - 1)),
                                 {file, line});
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, const char* file = __builtin_FILE(),
                        int line = __builtin_LINE()) {
  const int lane = inti::emulator::machine.lane(), from = lane - static_cast<int>(delta);
  const int source = from < (lane & ~(width - 1)) ? lane : from;
  return inti::emulator::shuffle(inti::emulator::Meeting::shfl_up, mask, value, source, {file, line});
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
  const int lane = inti::emulator::machine.lane(), from = lane + static_cast<int>(delta);
  const int source = from > (lane | (width - 1)) ? lane : from;
  return inti::emulator::shuffle(inti::emulator::Meeting::shfl_down, mask, value, source, {file, line});
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, const char* file = __builtin_FILE(),
                         int line = __builtin_LINE()) {
  const int lane = inti::emulator::machine.lane(), from = lane ^ lanes;
  const int source = from > (lane | (width - 1)) ? lane : from;
  return inti::emulator::shuffle(inti::emulator::Meeting::shfl_xor, mask, value, source, {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
  return inti::emulator::vote(inti::emulator::Meeting::ballot, mask, predicate != 0, {file, line});
}
inline int __any_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return inti::emulator::vote(inti::emulator::Meeting::any, mask, predicate != 0, {file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return inti::emulator::vote(inti::emulator::Meeting::all, mask, predicate != 0, {file, line}) == mask;
}

inline int atomicAdd(int* at, int value) { return inti::emulator::fetch_add(at, value); }
inline unsigned atomicAdd(unsigned* at, unsigned value) { return inti::emulator::fetch_add(at, value); }
inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long value) {
  return inti::emulator::fetch_add(at, value);
}
