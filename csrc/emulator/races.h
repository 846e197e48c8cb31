// Finds accesses to shared memory by two threads that no barrier orders.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace inti::emulator {

inline constexpr int warp_lanes = 32;
inline constexpr uint32_t all_lanes = 0xffffffffu;

// Time inside one warp since the block's last barrier. It advances at every __syncwarp; `known` says up to when each
// lane has been told of what another one did. Shuffles and votes order no memory, on the hardware either.
class WarpClock {
 public:
  uint32_t now() const { return now_; }
  void restart() {
    now_ = full_ = 0;
    partial_ = false;
  }
  void sync(uint32_t mask) {
    if (now_ < last) ++now_;
    if (mask == all_lanes) {
      full_ = now_;
      return;
    }
    if (!partial_) std::memset(known_, 0, sizeof known_);
    partial_ = true;
    uint16_t told[warp_lanes] = {};
    for (int lane = 0; lane < warp_lanes; ++lane) {
      if (!(mask >> lane & 1)) continue;
      for (int other = 0; other < warp_lanes; ++other) told[other] = std::max(told[other], known_[lane][other]);
    }
    for (int lane = 0; lane < warp_lanes; ++lane) {
      if (mask >> lane & 1) told[lane] = static_cast<uint16_t>(now_);
    }
    for (int lane = 0; lane < warp_lanes; ++lane) {
      if (mask >> lane & 1) std::memcpy(known_[lane], told, sizeof told);
    }
  }
  // Whether what `other` (a lane, or all of them) did at `then` lies behind what `lane` does now. Where the warp as a
  // whole is meant and only some lanes have met since, the answer is yes: no false alarms.
  bool ordered(int lane, int other, uint32_t then) const {
    if (then >= last || full_ > then) return true;
    if (!partial_) return false;
    return (other == warp_lanes ? *std::max_element(known_[lane], known_[lane] + warp_lanes) : known_[lane][other]) >
           then;
  }

  static constexpr uint32_t last = 0x1fff;  // where the clock stops: 13 bits

 private:
  uint32_t now_ = 0, full_ = 0;
  bool partial_ = false;
  uint16_t known_[warp_lanes][warp_lanes];
};

// Who an access is made by: a thread, or a warp as a whole (its lanes share the work in a way that code can't know).
inline constexpr uint32_t first_warp = 1024, many = 2046, nobody = 2047;

// An earlier access that races with the one at hand; by nobody if there is none.
struct Conflict {
  uint32_t who;
  bool wrote;
};

// Who touched each granule of shared memory since the block's last barrier, packed into 64 bits: the epoch (16), which
// numbers the barriers; the last writer (11) and its warp's time then (13); the same for readers, of which only one,
// one warp or "many" is kept.
class Races {
 public:
  void start_launch(int shared_bytes) {
    shared_bytes_ = shared_bytes;
    shift_ = 4;
    next_epoch();
  }
  void next_epoch() {
    if (++epoch_ < 0x10000) return;
    std::fill(cells_.begin(), cells_.end(), 0);
    epoch_ = 1;
  }

  // What this access races with. `who` makes it, at `clock`, in lane `lane` of `warp`.
  Conflict read(int offset, int bytes, uint32_t who, int warp, int lane, const WarpClock& clock) {
    uint64_t *at = first(offset, bytes), *const end = past(offset, bytes);
    // Nearly always others or itself have read all of it already, and nobody has written.
    const uint64_t now = clock.now(), found = *at;
    if (found == cell(nobody, 0, many, 0) || found == cell(nobody, 0, first_warp + static_cast<uint32_t>(warp), now) ||
        found == cell(nobody, 0, who, now)) {
      const uint64_t* other = at + 1;
      while (other < end && *other == found) ++other;
      if (other == end) return {nobody, false};
    }
    return read_slowly(at, end, who, warp, lane, clock);
  }
  Conflict write(int offset, int bytes, uint32_t who, int warp, int lane, const WarpClock& clock) {
    const uint64_t mine = cell(who, clock.now(), nobody, 0);
    for (uint64_t *at = first(offset, bytes), *const end = past(offset, bytes); at < end; ++at) {
      if (epoch(*at) == epoch_ && *at != mine) {
        const Conflict conflict = written_over(*at, who, warp, lane, clock);
        if (conflict.who != nobody) return conflict;
      }
      *at = mine;
    }
    return {nobody, false};
  }

 private:
  static uint32_t epoch(uint64_t cell) { return cell & 0xffff; }
  static uint32_t writer_of(uint64_t cell) { return cell >> 16 & 0x7ff; }
  static uint32_t write_time(uint64_t cell) { return cell >> 27 & 0x1fff; }
  static uint32_t reader_of(uint64_t cell) { return cell >> 40 & 0x7ff; }
  static uint32_t read_time(uint64_t cell) { return static_cast<uint32_t>(cell >> 51); }
  uint64_t cell(uint64_t writer, uint64_t write_time, uint64_t reader, uint64_t read_time) const {
    return epoch_ | writer << 16 | write_time << 27 | reader << 40 | read_time << 51;
  }
  static int warp_of(uint32_t who) { return static_cast<int>(who < first_warp ? who / warp_lanes : who - first_warp); }

  static bool ordered(uint32_t other, uint32_t then, int warp, int lane, const WarpClock& clock) {
    if (other == many || warp_of(other) != warp) return false;
    return clock.ordered(lane, other < first_warp ? static_cast<int>(other % warp_lanes) : warp_lanes, then);
  }

  __attribute__((noinline)) Conflict read_slowly(uint64_t* at, uint64_t* end, uint32_t who, int warp, int lane,
                                                 const WarpClock& clock) {
    const uint64_t mine = cell(nobody, 0, who, clock.now());
    for (; at < end; ++at) {
      if (epoch(*at) != epoch_) {
        *at = mine;
        continue;
      }
      const uint32_t writer = writer_of(*at), reader = reader_of(*at);
      if (writer != nobody) {
        const bool own = writer == who && who < first_warp;
        if (!own && !ordered(writer, write_time(*at), warp, lane, clock)) return {writer, true};
        if (own && write_time(*at) == clock.now()) continue;  // the write says it all
      }
      uint32_t now_reader = who, time = clock.now();
      if (reader != nobody && reader != who && !ordered(reader, read_time(*at), warp, lane, clock)) {
        now_reader = warp_of(reader) == warp ? first_warp + static_cast<uint32_t>(warp) : many;
        if (now_reader == many) time = 0;
      }
      *at = cell(writer, write_time(*at), now_reader, time);
    }
    return {nobody, false};
  }
  __attribute__((noinline)) Conflict written_over(uint64_t cell, uint32_t who, int warp, int lane,
                                                  const WarpClock& clock) const {
    const uint32_t writer = writer_of(cell), reader = reader_of(cell);
    if (writer != nobody && writer != who && !ordered(writer, write_time(cell), warp, lane, clock))
      return {writer, true};
    const bool own = reader == who && who < first_warp;
    if (reader != nobody && !own && !ordered(reader, read_time(cell), warp, lane, clock)) return {reader, false};
    return {nobody, false};
  }

  // A granule is as large as the smallest access of the launch so far.
  uint64_t* first(int offset, int bytes) {
    if (bytes < 1 << shift_) refine(bytes);
    return cells_.data() + (offset >> shift_);
  }
  uint64_t* past(int offset, int bytes) { return cells_.data() + ((offset + bytes) >> shift_); }
  void refine(int bytes) {
    const int before = shift_;
    while (bytes < 1 << shift_) --shift_;
    for (int i = (shared_bytes_ + 15) / 16 << (4 - shift_); i-- > 0;) cells_[i] = cells_[i >> (before - shift_)];
  }

  // Global barriers, not a block's: cells of the block before are old without being cleared.
  uint32_t epoch_ = 0;
  int shift_ = 4, shared_bytes_ = 0;
  std::vector<uint64_t> cells_ = std::vector<uint64_t>((256 * 1024) >> 1, 0);
};

}  // namespace inti::emulator
