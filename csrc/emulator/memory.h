// device.h's memory: every access is checked, and counted when asked for.
#pragma once

#include <cstdint>
#include <cstring>

#include "emulator/machine.h"

namespace inti {

template <int N, class T>
__device__ __forceinline__ Vec<T, N> load(const T* at) {
  static_assert(sizeof(Vec<T, N>) <= 16, "an access has up to 16 bytes");
  emulator::machine.global(at, sizeof(Vec<T, N>), false);
  Vec<T, N> value;
  std::memcpy(static_cast<void*>(&value), static_cast<const void*>(at), sizeof value);
  return value;
}
template <int N, class T>
__device__ __forceinline__ void store(T* at, const Vec<T, N>& value) {
  static_assert(sizeof value <= 16, "an access has up to 16 bytes");
  emulator::machine.global(at, sizeof value, true);
  std::memcpy(static_cast<void*>(at), &value, sizeof value);
}

template <class T, int N>
struct Loaded {
  Vec<T, N> vec;
  Vec<T, N> numbers() const { return vec; }
};
template <class T, int N>
__device__ __forceinline__ Loaded<T, N> loaded(const Vec<T, N>& numbers) {
  return {numbers};
}
template <int N, class T>
__device__ __forceinline__ Loaded<T, N> start_load(const T* at) {
  return {load<N>(at)};
}

template <class T>
struct Shared {
  int offset;  // in bytes, from the beginning of the block's
  Shared operator+(int n) const { return {offset + n * static_cast<int>(sizeof(T))}; }
};

template <class T>
__device__ __forceinline__ Shared<T> dynamic_shared(int byte_offset) {
  return {byte_offset};
}

template <int N, class T>
__device__ __forceinline__ Vec<T, N> load(Shared<T> from) {
  static_assert(sizeof(Vec<T, N>) <= 16, "an access has up to 16 bytes");
  Vec<T, N> value;
  std::memcpy(static_cast<void*>(&value), emulator::machine.shared(from.offset, sizeof value, false), sizeof value);
  return value;
}
template <int N, class T>
__device__ __forceinline__ void store(Shared<T> to, const Vec<T, N>& value) {
  static_assert(sizeof value <= 16, "an access has up to 16 bytes");
  std::memcpy(emulator::machine.shared(to.offset, sizeof value, true), &value, sizeof value);
}

}  // namespace inti
