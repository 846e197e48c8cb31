// Named cases for main.cpp, which runs them and says how each ended; tests/test_emulator.py knows how each should.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator/counting.h"
#include "inti/device.h"

namespace testing {

using inti::Launch;

struct Case {
  const char* name;
  void (*run)();
};
inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}
struct Add {
  Add(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

inline void expect(bool holds, const std::string& what) {
  if (!holds) throw std::logic_error(what);
}

// Memory of exactly n elements, so that AddressSanitizer knows where it ends.
template <class T>
struct Array {
  explicit Array(int64_t n) : data(new T[static_cast<size_t>(n)]()), size(n) {}
  T& operator[](int64_t i) { return data[static_cast<size_t>(i)]; }
  T* get() { return data.get(); }
  std::unique_ptr<T[]> data;
  int64_t size;
};

// Runs it with threads in many orders, all of which must end alike.
template <class Run>
void in_every_order(Run run) {
  int caught = 0, orders = 20;
  for (int seed = 0; seed < orders; ++seed) {
    inti::emulator::set_seed(static_cast<uint64_t>(seed));
    try {
      run();
    } catch (const inti::emulator::Error&) {
      if (++caught == orders) throw;
    }
  }
  expect(caught == 0, "caught in " + std::to_string(caught) + " orders of " + std::to_string(orders));
}

// A case in which a kernel is right only if threads that share a warp or a block are kept in step by barriers alone.
struct WithoutRaceCheck {
  WithoutRaceCheck() { inti::emulator::set_check_races(false); }
  ~WithoutRaceCheck() { inti::emulator::set_check_races(true); }
};

}  // namespace testing
