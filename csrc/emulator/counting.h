// What tests ask of the emulator, through python/cuda_bindings.cpp or from C++: the counts (their structs are in
// traffic.h), the seed of the threads' order, and which GPU it plays.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "emulator/machine.h"
#include "emulator/traffic.h"

namespace inti::emulator {

// From here on every launch is counted.
inline void start_recording() {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  machine.recorder.take();
  machine.recording = true;
}
// One record a launch, in their order; a launch that failed included.
inline std::vector<LaunchRecord> stop_recording() {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  machine.recording = false;
  return machine.recorder.take();
}

// Threads' order in all launches from here on. INTI_EMULATOR_SEED is what a process starts with, or 1.
inline void set_seed(uint64_t seed) {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  machine.set_seed(seed);
}

// 70 for 7.0, which a process starts with.
inline void set_compute_capability(int capability) {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  machine.compute_capability = capability;
}

// Whether accesses to shared memory that no barrier orders are errors.
inline void set_check_races(bool check) {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  machine.check_races = check;
}

}  // namespace inti::emulator
