// The device's memory, between guards. A GPU's, or under the emulator (INTI_EMULATED) the host's.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#ifndef INTI_EMULATED
#include <cuda_runtime.h>
#elif defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace standalone {

#ifdef INTI_EMULATED

inline void* allocate(size_t bytes) {
  void* memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (!memory) throw std::bad_alloc();
  return memory;
}
inline void release(void* memory) { std::free(memory); }
inline void copy_to_device(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
inline void copy_from_device(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
inline void* stream() { return nullptr; }
inline void synchronize() {}

#else

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}
inline void* allocate(size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes), "cudaMalloc");
  return memory;
}
inline void release(void* memory) { cudaFree(memory); }
inline void copy_to_device(void* to, const void* from, size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "cudaMemcpy to the device");
}
inline void copy_from_device(void* to, const void* from, size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy from the device");
}
// Not the default stream: a launch that ignores what it is given would show.
inline void* stream() {
  static cudaStream_t stream = [] {
    cudaStream_t created = nullptr;
    check(cudaStreamCreate(&created), "cudaStreamCreate");
    return created;
  }();
  return stream;
}
inline void synchronize() { check(cudaStreamSynchronize(static_cast<cudaStream_t>(stream())), "a kernel"); }

#endif

// Bytes on the device. They and the guards on both sides start as 0xff, a NaN in every dtype: what is read before it is
// written shows, and what is written outside does too. AddressSanitizer, where it is on, sees reads of the guards.
class Memory {
 public:
  explicit Memory(size_t bytes) : bytes_(bytes), all_(allocate(bytes + 2 * kGuard)) {
    const std::vector<unsigned char> fill(bytes + 2 * kGuard, 0xff);
    copy_to_device(all_, fill.data(), fill.size());
    forbid_guards();
  }
  Memory(Memory&& other) noexcept : bytes_(other.bytes_), all_(other.all_) { other.all_ = nullptr; }
  Memory& operator=(Memory&&) = delete;
  ~Memory() {
    if (!all_) return;
    allow_guards();
    release(all_);
  }

  void* data() const { return static_cast<unsigned char*>(all_) + kGuard; }
  void upload(const std::vector<unsigned char>& from) {
    if (bytes_) copy_to_device(data(), from.data(), bytes_);
  }

  // Throws if the guards were written to.
  std::vector<unsigned char> download(const char* what) const {
    std::vector<unsigned char> bytes(bytes_ + 2 * kGuard);
    allow_guards();
    copy_from_device(bytes.data(), all_, bytes.size());
    forbid_guards();
    for (size_t i = 0; i < bytes.size(); ++i) {
      if (i == kGuard) i += bytes_;
      if (bytes[i] != 0xff) {
        throw std::runtime_error(std::string(what) + ": memory " + (i < kGuard ? "before its begin" : "past its end") +
                                 " was written to");
      }
    }
    return std::vector<unsigned char>(bytes.begin() + kGuard, bytes.begin() + kGuard + bytes_);
  }

 private:
  static constexpr size_t kGuard = 256;

  void forbid_guards() const {
#if defined(INTI_EMULATED) && defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(all_, kGuard);
    ASAN_POISON_MEMORY_REGION(static_cast<unsigned char*>(data()) + bytes_, kGuard);
#endif
  }
  void allow_guards() const {
#if defined(INTI_EMULATED) && defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(all_, bytes_ + 2 * kGuard);
#endif
  }

  size_t bytes_;
  void* all_;
};

}  // namespace standalone
