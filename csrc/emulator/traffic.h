// What kernels read and wrote, counted at every access through device.h's load() and store().
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace inti::emulator {

// The 32-byte sectors of global memory that a block touched, in the order of first touch; distinct between two
// barriers. One that was both read and written there is there twice.
struct BlockTraffic {
  std::vector<uint64_t> sectors;  // address / 32
  std::vector<bool> written;      // beside each: written or read
};

// Accesses to shared memory by warps, all lanes at once as the hardware makes them.
struct SharedTraffic {
  int64_t accesses = 0;
  int64_t ideal = 0;       // wavefronts if there were no bank conflicts: one for every 128 bytes' worth of lanes
  int64_t wavefronts = 0;  // as they are: 32 banks of 4 bytes
};

// Accesses by threads to global memory, by width in bytes.
struct Widths {
  int64_t of_2 = 0, of_4 = 0, of_8 = 0, of_16 = 0;
};

struct LaunchRecord {
  std::string kernel;
  int64_t blocks = 0;
  int threads = 0;
  int shared_bytes = 0;
  std::vector<BlockTraffic> traffic;  // [blocks]
  Widths global_loads, global_stores;
  SharedTraffic shared_loads, shared_stores;
};

// Numbers seen before, and whether one is new.
class SeenSet {
 public:
  void clear() {
    slots_.assign(slots_.size(), 0);
    size_ = 0;
  }
  // `number` is not 0.
  bool add(uint64_t number) {
    if (2 * (size_ + 1) > slots_.size()) grow();
    uint64_t* slot = find(number);
    if (*slot == number) return false;
    *slot = number;
    ++size_;
    return true;
  }

 private:
  uint64_t* find(uint64_t number) {
    size_t at = (number * 0x9e3779b97f4a7c15u) >> 20;
    while (true) {
      uint64_t& slot = slots_[at++ & (slots_.size() - 1)];
      if (slot == 0 || slot == number) return &slot;
    }
  }
  void grow() {
    std::vector<uint64_t> old(std::max<size_t>(1024, 2 * slots_.size()), 0);
    old.swap(slots_);
    for (uint64_t number : old) {
      if (number) *find(number) = number;
    }
  }
  std::vector<uint64_t> slots_;
  size_t size_ = 0;
};

class Recorder {
 public:
  void start_launch(const char* kernel, int64_t blocks, int threads, int shared_bytes) {
    LaunchRecord record;
    record.kernel = kernel;
    record.blocks = blocks;
    record.threads = threads;
    record.shared_bytes = shared_bytes;
    launches_.push_back(std::move(record));
  }
  void start_block() {
    launches_.back().traffic.emplace_back();
    seen_.clear();
  }

  void global(uint64_t address, int bytes, bool write) {
    LaunchRecord& record = launches_.back();
    Widths& widths = write ? record.global_stores : record.global_loads;
    ++(bytes == 2 ? widths.of_2 : bytes == 4 ? widths.of_4 : bytes == 8 ? widths.of_8 : widths.of_16);
    const uint64_t sector = address / 32;  // an access is aligned to its width and so in one sector
    if (!seen_.add(2 * sector + write)) return;
    record.traffic.back().sectors.push_back(sector);
    record.traffic.back().written.push_back(write);
  }

  // Lanes of a warp that are at the same place in the code, for as many times since the block's last barrier, make one
  // access.
  void shared(const void* site, int warp, int lane, int offset, int bytes, bool write, bool collective) {
    Site& of_site = pending_[{site, warp}];
    const size_t time = of_site.times[lane]++;
    if (time == of_site.accesses.size()) of_site.accesses.push_back({0, bytes, write, collective, {}});
    of_site.accesses[time].lanes |= 1u << lane;
    of_site.accesses[time].offset[lane] = offset;
  }
  // At a barrier and at the end of a block.
  void settle() {
    seen_.clear();
    for (const auto& [where, site] : pending_) {
      for (const Accesses& accesses : site.accesses) add(accesses);
    }
    pending_.clear();
  }

  std::vector<LaunchRecord> take() { return std::exchange(launches_, {}); }

 private:
  struct Accesses {
    uint32_t lanes;
    int bytes;
    bool write, collective;
    std::array<int, 32> offset;
  };
  struct Site {
    std::vector<Accesses> accesses;
    std::array<size_t, 32> times{};
  };

  void add(const Accesses& accesses) {
    SharedTraffic& traffic = accesses.write ? launches_.back().shared_stores : launches_.back().shared_loads;
    ++traffic.accesses;
    // 8- and 16-byte accesses are served by half and quarter warps. Of fragments nobody knows which lane takes what:
    // they count as the best that any layout could do.
    const int step = accesses.bytes <= 4 ? 32 : 128 / accesses.bytes;
    const int together = accesses.collective ? 32 : step;
    for (int first = 0; first < 32; first += together) {
      int64_t ideal = 0;
      for (int lane = first; lane < first + together; lane += step) {
        ideal += (accesses.lanes >> lane & (step == 32 ? 0xffffffffu : (1u << step) - 1)) != 0;
      }
      traffic.ideal += ideal;
      traffic.wavefronts += std::max(ideal, conflicts(accesses, first, together));
    }
  }

  // The most words that `count` lanes want from one bank; a word goes to all lanes that ask for it at once.
  static int64_t conflicts(const Accesses& accesses, int first, int count) {
    std::array<std::vector<int>, 32> words;
    size_t most = 0;
    for (int lane = first; lane < first + count; ++lane) {
      if (!(accesses.lanes >> lane & 1)) continue;
      for (int byte = 0; byte < accesses.bytes; byte += 4) {
        const int word = (accesses.offset[lane] + byte) / 4;
        std::vector<int>& bank = words[word % 32];
        if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
        most = std::max(most, bank.size());
      }
    }
    return static_cast<int64_t>(most);
  }

  std::vector<LaunchRecord> launches_;
  SeenSet seen_;
  std::map<std::pair<const void*, int>, Site> pending_;
};

}  // namespace inti::emulator
