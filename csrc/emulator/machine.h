// The machine that kernels run on: a grid's blocks one after the other, a block's threads as fibers. A thread runs
// until it must wait for others; then the next one runs, in an order that a seed shuffles. One machine a process.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "emulator/fiber.h"
#include "emulator/parts.h"
#include "emulator/races.h"
#include "emulator/traffic.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim{}, gridDim{};

namespace inti::emulator {

class Machine {
 public:
  static constexpr int most_threads = 1024;

  Machine() {
    const char* seed = std::getenv("INTI_EMULATOR_SEED");
    set_seed(seed ? std::strtoull(seed, nullptr, 0) : 1);
    if (const char* races = std::getenv("INTI_EMULATOR_RACES")) check_races = *races != '0';
  }

  void set_seed(uint64_t seed) {
    random_.state = seed;
    for (auto& order : orders_) {
      for (int i = 0; i < warp_lanes; ++i) order[i] = static_cast<uint8_t>(i);
      std::shuffle(order, order + warp_lanes, random_);
    }
  }

  void launch(const Grid& grid, const Body& body) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (owner_ != std::this_thread::get_id()) reset_fibers();  // a stack stays with the thread that began it
    owner_ = std::this_thread::get_id();
    grid_ = grid;
    body_ = body;
    blockDim.x = static_cast<unsigned>(grid.threads);
    gridDim.x = static_cast<unsigned>(grid.blocks);
    races_.start_launch(grid.shared_bytes);
    watched_ = check_races || recording;
    if (recording) recorder.start_launch(grid.kernel, grid.blocks, grid.threads, grid.shared_bytes);
    for (int64_t block = 0; block < grid.blocks; ++block) {
      blockIdx.x = static_cast<unsigned>(block);
      run_block();
    }
  }

  // __syncthreads().
  void barrier(Site site) {
    Warp& warp = *warp_;
    if (ended_) fail("divergent barrier: waits at " + site.words() + ", but " + any_ended() + " has ended");
    if (arrived_ == 0) {
      barrier_ = site;
      first_at_barrier_ = thread_;
    } else if (!(site == barrier_)) {
      fail("divergent barrier: waits at " + site.words() + ", but thread " + std::to_string(first_at_barrier_) +
           " waits at another, " + barrier_.words());
    }
    if (warp.group_count) nobody_waits_for_me("waits for the whole block at " + site.words());
    warp.at_barrier |= 1u << lane();
    if (++arrived_ == grid_.threads) release();
    park();
  }

  // Waits until every lane of `mask` has come to the same meeting; the last one calls `finish`.
  template <class Finish>
  void meet(Meeting meeting, uint32_t mask, Site site, Finish finish) {
    Warp& warp = *warp_;
    const int group = join(warp, meeting, mask, site);
    warp.groups[group].arrived |= 1u << lane();
    if (warp.groups[group].arrived != mask) {
      park();
      return;
    }
    warp.groups[group] = warp.groups[--warp.group_count];
    if (mask == all_lanes) check_trails(warp);
    if (meeting == Meeting::syncwarp) warp.clock.sync(mask);
    finish(warp);
    enqueue(warp, mask & ~(1u << lane()));
  }

  // Before an access. `collective`: the warp's, of which this lane does a part. What is rare is out of line, for these
  // are inlined wherever a kernel touches memory.
  __attribute__((always_inline)) void* shared(int offset, int bytes, bool write, bool collective = false) {
    if (__builtin_expect(offset < 0 || offset > grid_.shared_bytes - bytes || (offset & (bytes - 1)), 0)) {
      bad_shared(offset, bytes, write);
    }
    if (watched_) watch(offset, bytes, write, collective);
    return shared_ + offset;
  }
  __attribute__((always_inline)) void global(const void* at, int bytes, bool write) {
    const auto address = reinterpret_cast<uintptr_t>(at);
    if (__builtin_expect((address & static_cast<uintptr_t>(bytes - 1)) != 0 || address < 4096, 0)) {
      bad_global(address, bytes, write);
    }
#ifdef __SANITIZE_ADDRESS__
    check_allocated(address, bytes, write);
#endif
    if (__builtin_expect(recording, 0)) recorder.global(address, bytes, write);
  }

  // All lanes must leave the same trail.
  void leave_trail(uint64_t step) { warp_->trail[lane()] = (warp_->trail[lane()] ^ step) * 0x9e3779b97f4a7c15u + 1; }

  [[noreturn]] __attribute__((cold, noinline)) void fail(const std::string& what) const {
    throw Error(std::string("inti_kernels emulator: kernel ") + grid_.kernel + ", block " + std::to_string(blockIdx.x) +
                ", thread " + std::to_string(thread_) + ": " + what);
  }

  Warp& warp() { return *warp_; }
  int lane() const { return thread_ % warp_lanes; }
  const Grid& grid() const { return grid_; }

  std::mutex mutex;
  bool recording = false;
  bool check_races = true;
  int compute_capability = 70;
  Recorder recorder;

 private:
  void run_block() {
    std::memset(shared_, 0xff, static_cast<size_t>(grid_.shared_bytes));
    races_.next_epoch();
    if (recording) recorder.start_block();
    ended_ = 0;
    const int warps = (grid_.threads + warp_lanes - 1) / warp_lanes;
    for (int i = 0; i < warps; ++i) {
      Warp& warp = warps_[i];
      const int lanes = std::min(warp_lanes, grid_.threads - i * warp_lanes);
      warp.exists = lanes == warp_lanes ? all_lanes : (1u << lanes) - 1;
      warp.ended = 0;
      warp.group_count = 0;
      std::memset(warp.trail, 0, sizeof warp.trail);
    }
    release();
    go(take());
    if (error_) {
      reset_fibers();
      std::rethrow_exception(std::exchange(error_, nullptr));
    }
    if (recording) recorder.settle();
  }

  // --- Whose turn it is ----------------------------------------------------------------------------------------------

  // All threads may go on: the start of a block, and the end of a barrier.
  void release() {
    const int warps = (grid_.threads + warp_lanes - 1) / warp_lanes;
    if (arrived_) {
      races_.next_epoch();
      if (recording) recorder.settle();
    }
    arrived_ = 0;
    for (int i = 0; i < warps; ++i) {
      Warp& warp = warps_[i];
      if (warp.at_barrier) check_trails(warp);
      warp.at_barrier = 0;
      warp.clock.restart();
      warp.head = warp.tail = 0;
      enqueue(warp, warp.exists);
      const int at = static_cast<int>(random_() % static_cast<unsigned>(i + 1));
      turns_[i] = turns_[at];
      turns_[at] = i;
    }
    next_turn_ = 1;
    turn_count_ = warps;
    warp_ = &warps_[turns_[0]];
  }

  void enqueue(Warp& warp, uint32_t lanes) {
    if (warp.head == warp.tail) warp.head = warp.tail = 0;
    if (warp.tail > warp_lanes) {
      std::copy(warp.queue + warp.head, warp.queue + warp.tail, warp.queue);
      warp.tail -= warp.head;
      warp.head = 0;
    }
    const uint8_t* order = orders_[random_() % order_count];
    for (int i = 0; i < warp_lanes; ++i) {
      warp.queue[warp.tail] = order[i];
      warp.tail += lanes >> order[i] & 1;
    }
  }

  // The thread whose turn is next; -1 if there is none. Only lanes of the running warp are ever freed but by a barrier,
  // so a warp's turn ends when all of its lanes wait for the block.
  int take() {
    while (warp_->head == warp_->tail) {
      if (next_turn_ == turn_count_) return -1;
      warp_ = &warps_[turns_[next_turn_++]];
    }
    return static_cast<int>(warp_ - warps_) * warp_lanes + warp_->queue[warp_->head++];
  }

  void set_thread(int thread) {
    thread_ = thread;
    threadIdx.x = static_cast<unsigned>(thread);
  }

  // Waits for its own next turn.
  void park() {
    const int next = take();
    if (next == thread_) return;
    if (next < 0) deadlock();
    go(next);
  }

  void go(int next) {
    if (!fiber_of_[next]) fiber_of_[next] = free_fiber();
    set_thread(next);
    Fiber* from = std::exchange(running_, fiber_of_[next]);
    from->switch_to(*running_);
  }

  // What every fiber does: it runs one thread after the other, without a switch between those that never wait.
  void work() {
    running_->arrived();
    while (true) {
      try {
        while (true) {
          body_.run(body_.kernel);
          end_thread();
          const int next = take();
          fiber_of_[thread_] = nullptr;
          if (next < 0) break;
          if (fiber_of_[next]) {
            free_.push_back(running_);
            go(next);
          } else {
            fiber_of_[next] = running_;
            set_thread(next);
          }
        }
        if (ended_ < grid_.threads) deadlock();
        free_.push_back(running_);
      } catch (...) {
        error_ = std::current_exception();
      }
      std::exchange(running_, &main_)->switch_to(main_);
    }
  }

  void end_thread() {
    Warp& warp = *warp_;
    if (arrived_) {
      fail("divergent barrier: it ended, but thread " + std::to_string(first_at_barrier_) + " waits at " +
           barrier_.words());
    }
    if (warp.group_count) nobody_waits_for_me("it ended");
    warp.ended |= 1u << lane();
    ++ended_;
    if (warp.ended == warp.exists) check_trails(warp);
  }

  Fiber* free_fiber() {
    if (free_.empty()) {
      fibers_.emplace_back(static_cast<int>(fibers_.size()), &enter);
      free_.push_back(&fibers_.back());
    }
    Fiber* fiber = free_.back();
    free_.pop_back();
    return fiber;
  }

  // After an error the other threads are abandoned where they stand: kernels own nothing.
  __attribute__((cold)) void reset_fibers() {
    free_.clear();
    for (Fiber& fiber : fibers_) {
      fiber.reset();
      free_.push_back(&fiber);
    }
    std::fill(fiber_of_, fiber_of_ + most_threads, nullptr);
    arrived_ = 0;
    for (Warp& warp : warps_) warp.at_barrier = 0;
    if (recording) recorder.settle();
  }

  static void enter();

  // --- What may go wrong ---------------------------------------------------------------------------------------------

  int join(Warp& warp, Meeting meeting, uint32_t mask, Site site) {
    if (!(mask >> lane() & 1)) {
      fail(words(meeting, mask, site) + ": the mask leaves out the calling lane " + std::to_string(lane()));
    }
    for (int i = 0; i < warp.group_count; ++i) {
      const Warp::Group& group = warp.groups[i];
      if (group.mask == mask && group.meeting == meeting && group.site == site) return i;
      // Lanes that wait elsewhere may come later, but not if they wait for this one.
      if (group.arrived & mask && group.mask >> lane() & 1) disagree(group, meeting, mask, site);
    }
    if (mask & ~warp.exists) absent(warp, meeting, mask, site, mask & ~warp.exists, "does not exist");
    if (mask & warp.ended) absent(warp, meeting, mask, site, mask & warp.ended, "has ended");
    if (mask & warp.at_barrier) {
      absent(warp, meeting, mask, site, mask & warp.at_barrier, "waits at the barrier " + barrier_.words());
    }
    warp.groups[warp.group_count] = {mask, 0, meeting, site};
    return warp.group_count++;
  }

  __attribute__((cold, noinline)) void disagree(const Warp::Group& group, Meeting meeting, uint32_t mask, Site site) {
    const int other = thread_ / warp_lanes * warp_lanes + __builtin_ctz(group.arrived);
    fail(words(meeting, mask, site) + ": the warp diverged: thread " + std::to_string(other) + " waits at " +
         words(group.meeting, group.mask, group.site));
  }
  [[noreturn]] __attribute__((cold, noinline)) void absent(Warp& warp, Meeting meeting, uint32_t mask, Site site,
                                                           uint32_t lanes, const std::string& why) {
    const int64_t other = (&warp - warps_) * warp_lanes + __builtin_ctz(lanes);
    fail(words(meeting, mask, site) + ": thread " + std::to_string(other) + " of the mask " + why);
  }
  void nobody_waits_for_me(const std::string& instead) {
    const Warp& warp = *warp_;
    for (int i = 0; i < warp.group_count; ++i) {
      const Warp::Group& group = warp.groups[i];
      if (!(group.mask >> lane() & 1)) continue;
      const int other = thread_ / warp_lanes * warp_lanes + __builtin_ctz(group.arrived);
      fail(instead + ", but thread " + std::to_string(other) + " waits for it at " +
           words(group.meeting, group.mask, group.site));
    }
  }
  std::string any_ended() const {
    const Warp* warp = warps_;
    while (!warp->ended) ++warp;
    return "thread " + std::to_string((warp - warps_) * warp_lanes + __builtin_ctz(warp->ended));
  }
  [[noreturn]] __attribute__((cold, noinline)) void deadlock() {
    const Warp* warp = warps_;
    while (!warp->group_count) ++warp;
    const Warp::Group& group = warp->groups[0];
    const int64_t one = (warp - warps_) * warp_lanes + __builtin_ctz(group.arrived);
    fail("deadlock: all threads that have not ended wait, such as thread " + std::to_string(one) + " at " +
         words(group.meeting, group.mask, group.site));
  }
  void check_trails(Warp& warp) {
    for (int lane = 0; lane < warp_lanes; ++lane) {
      if (warp.exists >> lane & 1 && warp.trail[lane] != warp.trail[0]) {
        fail("lanes 0 and " + std::to_string(lane) + " of warp " + std::to_string(&warp - warps_) +
             " loaded or stored fragments differently since they last met");
      }
    }
    std::memset(warp.trail, 0, sizeof warp.trail);
  }

  [[noreturn]] __attribute__((cold, noinline)) void bad_global(uint64_t address, int bytes, bool write) {
    if (address < 4096) fail(words(address, bytes, write) + ": a null pointer");
    fail("misaligned " + words(address, bytes, write) + ": the address must be a multiple of " + std::to_string(bytes));
  }
#ifdef __SANITIZE_ADDRESS__
  __attribute__((noinline)) void check_allocated(uint64_t address, int bytes, bool write) {
    if (!__asan_region_is_poisoned(reinterpret_cast<void*>(address), static_cast<size_t>(bytes))) return;
    fail(words(address, bytes, write) + ": out of bounds of every allocation, says AddressSanitizer");
  }
#endif

  [[noreturn]] __attribute__((cold, noinline)) void bad_shared(int offset, int bytes, bool write) {
    if (offset < 0 || offset > grid_.shared_bytes - bytes) {
      fail(words(offset, bytes, write) + ": out of bounds, the launch has " + std::to_string(grid_.shared_bytes));
    }
    fail("misaligned " + words(offset, bytes, write) + ": it must be a multiple of " + std::to_string(bytes));
  }

  // The address in the kernel that it returns to tells accesses apart; so whatever calls it is inlined into the kernel.
  __attribute__((noipa, noinline)) void watch(int offset, int bytes, bool write, bool collective) {
    const int warp = thread_ / warp_lanes;
    if (recording) recorder.shared(__builtin_return_address(0), warp, lane(), offset, bytes, write, collective);
    if (!check_races) return;
    const uint32_t who = collective ? first_warp + static_cast<uint32_t>(warp) : static_cast<uint32_t>(thread_);
    const Conflict conflict = write ? races_.write(offset, bytes, who, warp, lane(), warp_->clock)
                                    : races_.read(offset, bytes, who, warp, lane(), warp_->clock);
    if (__builtin_expect(conflict.who != nobody, 0)) raced(offset, bytes, write, conflict);
  }
  [[noreturn]] __attribute__((cold, noinline)) void raced(int offset, int bytes, bool write, Conflict with) {
    const std::string name = with.who == many        ? "threads of several warps"
                             : with.who < first_warp ? "thread " + std::to_string(with.who)
                                                     : "warp " + std::to_string(with.who - first_warp);
    fail("race: " + words(offset, bytes, write) + ", which " + name + (with.wrote ? " wrote" : " read") +
         ", with no barrier between the two (within a warp, __syncwarp; shuffles and votes order no memory)");
  }

  // --- State ---------------------------------------------------------------------------------------------------------

  Grid grid_{};
  bool watched_ = false;
  Body body_{};
  int thread_ = 0;
  Warp* warp_ = nullptr;
  Fiber* running_ = &main_;
  Fiber* fiber_of_[most_threads] = {};
  Warp warps_[most_threads / warp_lanes] = {};
  int turns_[most_threads / warp_lanes] = {};
  int next_turn_ = 0, turn_count_ = 0;
  int ended_ = 0, arrived_ = 0, first_at_barrier_ = 0;
  Site barrier_{};
  std::exception_ptr error_;

  Races races_;
  alignas(128) unsigned char shared_[227 * 1024];

  static constexpr unsigned order_count = 64;
  uint8_t orders_[order_count][warp_lanes];
  Random random_;

  std::thread::id owner_;
  Fiber main_;
  std::deque<Fiber> fibers_;
  std::vector<Fiber*> free_;
};

inline Machine machine;

inline void Machine::enter() { machine.work(); }

}  // namespace inti::emulator
