// Stacks that take turns on one thread of the operating system.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace inti::emulator {

#ifdef __SANITIZE_ADDRESS__
inline constexpr size_t stack_bytes = 512 * 1024;
#else
inline constexpr size_t stack_bytes = 128 * 1024;
#endif

#ifdef __x86_64__
// Keeps the registers that a call must leave alone on the old stack, and goes on where the new one stopped. By ret: the
// threads of a block mostly stop at one place, and so the processor predicts it.
__attribute__((naked, noipa, noinline, no_profile_instrument_function)) inline void switch_stacks(
    [[maybe_unused]] void** from, [[maybe_unused]] void* to) {
  asm volatile(
      "pushq %rbp\n\t"
      "pushq %rbx\n\t"
      "pushq %r12\n\t"
      "pushq %r13\n\t"
      "pushq %r14\n\t"
      "pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq %rsi, %rsp\n\t"
      "popq %r15\n\t"
      "popq %r14\n\t"
      "popq %r13\n\t"
      "popq %r12\n\t"
      "popq %rbx\n\t"
      "popq %rbp\n\t"
      "retq\n\t");
}
#endif

class Fiber {
 public:
  // Stands for the stack that is running.
  Fiber() = default;

  // Runs `entry`, which must never return, when first switched to.
  Fiber(int index, void (*entry)()) : index_(index), entry_(entry) {
    void* memory =
        mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    low_ = static_cast<char*>(memory);
    mprotect(low_, 4096, PROT_NONE);  // an overflow stops here and not in the next stack
    reset();
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
    if (low_) munmap(low_, stack_bytes);
  }

  // Forgets what it was doing.
  void reset() {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(low_ + 4096, stack_bytes - 4096);
    fake_ = nullptr;
    bottom_ = low_;
    size_ = stack_bytes;
#endif
#ifdef __x86_64__
    // Tops that lie equally in all stacks would share a few sets of the cache.
    void** top = reinterpret_cast<void**>(low_ + stack_bytes - 64 - (index_ * 320) % 16384);
    *--top = nullptr;  // entry's return address, and the alignment that a call leaves
    *--top = reinterpret_cast<void*>(entry_);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stopped_at_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = low_ + 4096;
    context_.uc_stack.ss_size = stack_bytes - 4096 - (index_ * 320) % 16384 / 64 * 64;
    context_.uc_link = nullptr;
    makecontext(&context_, entry_, 0);
#endif
  }

  void switch_to(Fiber& to) {
#ifdef __SANITIZE_ADDRESS__
    came_from_ = this;
    __sanitizer_start_switch_fiber(&fake_, to.bottom_, to.size_);
#endif
#ifdef __x86_64__
    switch_stacks(&stopped_at_, to.stopped_at_);
#else
    swapcontext(&context_, &to.context_);
#endif
    arrived();
  }

  // To be called first on every stack that was switched to; switch_to does it, `entry` must.
  void arrived() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_, &came_from_->bottom_, &came_from_->size_);
#endif
  }

 private:
  int index_ = 0;
  void (*entry_)() = nullptr;
  char* low_ = nullptr;
#ifdef __x86_64__
  void* stopped_at_ = nullptr;
#else
  ucontext_t context_;
#endif
#ifdef __SANITIZE_ADDRESS__
  void* fake_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
  static inline Fiber* came_from_ = nullptr;
#endif
};

}  // namespace inti::emulator
