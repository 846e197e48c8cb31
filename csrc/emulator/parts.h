// What the machine is made of: warps, grids, random orders, errors and the words for them.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "emulator/races.h"

namespace inti::emulator {

// What a kernel did wrong, or a launch that the hardware would refuse.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A place in the source. Not an address in the code, of which the compiler may make several.
struct Site {
  const char* file;
  int line;
  bool operator==(const Site& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
  }
  std::string words() const {
    const char* slash = std::strrchr(file, '/');
    return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
  }
};

enum class Meeting { syncwarp, shfl, shfl_up, shfl_down, shfl_xor, ballot, any, all, mma };

inline const char* name(Meeting meeting) {
  constexpr const char* names[] = {"__syncwarp",       "__shfl_sync",     "__shfl_up_sync",
                                   "__shfl_down_sync", "__shfl_xor_sync", "__ballot_sync",
                                   "__any_sync",       "__all_sync",      "mma_sync"};
  return names[static_cast<int>(meeting)];
}

inline std::string hex(uint64_t number) {
  constexpr char digits[] = "0123456789abcdef";
  std::string text;
  do {
    text.insert(text.begin(), digits[number % 16]);
  } while (number /= 16);
  return "0x" + text;
}

// Splitmix64: any seed will do, and it is quick.
struct Random {
  using result_type = uint64_t;
  static constexpr uint64_t min() { return 0; }
  static constexpr uint64_t max() { return ~uint64_t{0}; }
  uint64_t operator()() {
    uint64_t bits = state += 0x9e3779b97f4a7c15u;
    bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9u;
    bits = (bits ^ bits >> 27) * 0x94d049bb133111ebu;
    return bits ^ bits >> 31;
  }
  uint64_t state = 0;
};

struct Warp {
  // Lanes that can go on, [head, tail); never more than the warp has.
  uint8_t queue[2 * warp_lanes];
  int head, tail;
  uint32_t exists, ended, at_barrier;

  // Lanes that wait for the others of a mask. A lane has arrived in one group at most.
  struct Group {
    uint32_t mask, arrived;
    Meeting meeting;
    Site site;
  };
  Group groups[warp_lanes];
  int group_count;

  // What lanes bring to a meeting and take from it.
  uint64_t value[warp_lanes], result[warp_lanes];
  int source[warp_lanes];
  void* operands[warp_lanes][4];

  // Of each lane, what it did since the last meeting that all lanes must do alike without waiting for each other
  // (loading and storing fragments).
  uint64_t trail[warp_lanes];

  WarpClock clock;
};

struct Body {
  void (*run)(const void*);
  const void* kernel;
};

struct Grid {
  const char* kernel;
  int64_t blocks;
  int threads, shared_bytes;
};

// For messages.
inline std::string words(Meeting meeting, uint32_t mask, Site site) {
  return std::string(name(meeting)) + "(" + hex(mask) + ") at " + site.words();
}

inline std::string words(uint64_t address, int bytes, bool write) {
  return std::string(write ? "write" : "read") + " of " + std::to_string(bytes) + " bytes of global memory at " +
         hex(address);
}
inline std::string words(int offset, int bytes, bool write) {
  return std::string(write ? "write" : "read") + " of " + std::to_string(bytes) + " bytes of shared memory at byte " +
         std::to_string(offset);
}

}  // namespace inti::emulator
