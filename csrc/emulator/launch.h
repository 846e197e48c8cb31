// device.h's launch(): runs the whole grid before it returns. Throws what the kernel did wrong.
#pragma once

#include <string>

#include "emulator/machine.h"

namespace inti {

inline int compute_capability() { return emulator::machine.compute_capability; }
inline int compiled_for() { return compute_capability(); }

namespace emulator {

// The most shared memory that a block can opt in to.
inline int most_shared_bytes() {
  const int capability = machine.compute_capability;
  const int kib = capability >= 90 ? 227 : capability >= 86 ? 99 : capability >= 80 ? 163 : capability >= 75 ? 64 : 96;
  return kib * 1024;
}

inline void check(const Launch& how) {
  const auto refuse = [&](const std::string& why) {
    throw Error("inti_kernels emulator: " + describe(how) + " can't start: " + why);
  };
  if (how.blocks < 0 || how.blocks > 0x7fffffff) refuse("a grid has 1 to 2147483647 blocks");
  if (how.threads < 1 || how.threads > Machine::most_threads) refuse("a block has 1 to 1024 threads");
  if (how.threads > how.most_threads) {
    refuse("the kernel's launch bounds are " + std::to_string(how.most_threads) + " threads");
  }
  if (how.threads > warp_lanes && how.threads % warp_lanes != 0) refuse("threads must fill whole warps of 32");
  if (how.shared_bytes < 0 || how.shared_bytes > most_shared_bytes()) {
    refuse("compute capability " + std::to_string(compute_capability()) + " has " +
           std::to_string(most_shared_bytes()) + " bytes of shared memory for a block");
  }
}

}  // namespace emulator

template <class... Parameters>
void launch(void (*kernel)(Parameters...), const Launch& how, Parameters... parameters) {
  if (how.blocks == 0) return;
  emulator::check(how);
  const auto call = [&] { kernel(parameters...); };
  using Call = decltype(call);
  emulator::machine.launch({how.kernel, how.blocks, how.threads, how.shared_bytes},
                           {[](const void* call) { (*static_cast<Call*>(call))(); }, &call});
}

}  // namespace inti
