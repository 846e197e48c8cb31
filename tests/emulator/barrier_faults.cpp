// Barriers, shuffles and votes used wrongly, and launches that no GPU would start; beside each, where it isn't obvious,
// a twin that is right.
#include "harness.h"

namespace testing {

using namespace inti;

// Each thread passes its number to its neighbour through shared memory.
template <bool BARRIER>
__global__ void pass_on(float* out) {
  const int i = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
  const auto tile = dynamic_shared<float>(0);
  store(tile + i, static_cast<float>(i));
  if (BARRIER) __syncthreads();
  store(out + i, load(tile + (i + 1) % n));
}

template <bool BARRIER>
void run_pass_on() {
  Array<float> out(128);
  launch(&pass_on<BARRIER>, Launch{"pass_on", 1, 128, 512, nullptr}, out.get());
  for (int i = 0; i < 128; ++i) expect(out[i] == static_cast<float>((i + 1) % 128), "a neighbour's number is wrong");
}
const Add with_barrier("barrier", [] { run_pass_on<true>(); });
const Add without_barrier("missing_barrier", [] { run_pass_on<false>(); });
// Without the race check too it shows, by the threads' order, whatever the seed.
const Add without_barrier_or_check("missing_barrier_by_order", [] {
  const WithoutRaceCheck unchecked;
  in_every_order([] {
    try {
      run_pass_on<false>();
    } catch (const std::logic_error&) {
      return;
    }
    expect(false, "the order of threads did not show it");
  });
});

// A fault for each value, so that they share the words around them.
enum class Fault {
  half_the_block_waits,
  two_places,
  one_returned,
  one_returns_later,
  lanes_returned,
  lanes_return_later,
  lanes_at_barrier,
  barrier_while_lanes_wait,
  not_in_mask,
  masks_differ,
  collectives_differ,
  places_differ,
  reads_outside_mask,
  syncwarp_absent,
  ballot_absent,
  ring_of_masks,
};

template <Fault FAULT>
__global__ void faulty() {
  const int i = static_cast<int>(threadIdx.x);
  const unsigned all = 0xffffffffu;
  switch (FAULT) {
    case Fault::half_the_block_waits:
      if (i < 32) __syncthreads();
      break;
    case Fault::two_places:
      if (i < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case Fault::one_returned:
      if (i == 5) return;
      __syncthreads();
      break;
    case Fault::one_returns_later:
      __syncthreads();
      if (i == 40) return;
      __syncthreads();
      break;
    case Fault::lanes_returned:
      if (i % 32 >= 16) return;
      __shfl_sync(all, i, 0);
      break;
    case Fault::lanes_return_later:
      __syncwarp();
      if (i % 32 == 31) return;
      __shfl_xor_sync(all, i, 1);
      break;
    case Fault::lanes_at_barrier:
      if (i % 32 >= 16) __shfl_down_sync(all, 1.0f, 16);
      __syncthreads();
      break;
    case Fault::barrier_while_lanes_wait:
      if (i == 3) __syncthreads();
      __syncwarp();
      __syncthreads();
      break;
    case Fault::not_in_mask:
      __shfl_sync(0x0000fffeu, i, 1);
      break;
    case Fault::masks_differ:
      __shfl_up_sync(i % 32 == 7 ? 0x000000ffu : all, i, 1);
      break;
    case Fault::collectives_differ:
      if (i % 32 == 9) {
        __any_sync(all, i);
      } else {
        __all_sync(all, i);
      }
      break;
    case Fault::places_differ:
      if (i % 32 == 9) {
        __syncwarp();
      } else {
        __syncwarp();
      }
      break;
    case Fault::reads_outside_mask:
      if (i % 32 < 16) __shfl_sync(0x0000ffffu, i, 20);
      break;
    case Fault::syncwarp_absent:
      if (i < 63) __syncwarp();
      break;
    case Fault::ballot_absent:
      if (i != 33) __ballot_sync(all, 1);
      break;
    case Fault::ring_of_masks:  // each of three lanes waits for the next one
      if (i < 3) __syncwarp(1u << i | 1u << (i + 1) % 3);
      break;
  }
}

template <Fault FAULT>
void run_faulty() {
  in_every_order([] { launch(&faulty<FAULT>, Launch{"faulty", 3, 64, 0, nullptr}); });
}
const Add half_the_block("half_the_block_waits", &run_faulty<Fault::half_the_block_waits>);
const Add two_places("barriers_in_two_places", &run_faulty<Fault::two_places>);
const Add one_returned("barrier_after_return", &run_faulty<Fault::one_returned>);
const Add one_returns_later("return_between_barriers", &run_faulty<Fault::one_returns_later>);
const Add lanes_returned("shuffle_after_return", &run_faulty<Fault::lanes_returned>);
const Add lanes_return_later("return_before_shuffle", &run_faulty<Fault::lanes_return_later>);
const Add lanes_at_barrier("shuffle_of_half_the_lanes", &run_faulty<Fault::lanes_at_barrier>);
const Add barrier_while_waiting("barrier_while_lanes_wait", &run_faulty<Fault::barrier_while_lanes_wait>);
const Add not_in_mask("caller_not_in_mask", &run_faulty<Fault::not_in_mask>);
const Add masks_differ("masks_differ", &run_faulty<Fault::masks_differ>);
const Add collectives_differ("collectives_differ", &run_faulty<Fault::collectives_differ>);
const Add places_differ("collectives_in_two_places", &run_faulty<Fault::places_differ>);
const Add reads_outside("shuffle_reads_outside_mask", &run_faulty<Fault::reads_outside_mask>);
const Add syncwarp_absent("syncwarp_of_absent_lane", &run_faulty<Fault::syncwarp_absent>);
const Add ring_of_masks("ring_of_masks", &run_faulty<Fault::ring_of_masks>);
const Add ballot_absent("ballot_of_absent_lane", &run_faulty<Fault::ballot_absent>);

__global__ void all_lanes_shuffle() { __shfl_sync(0xffffffffu, 1, 0); }
const Add small_block("shuffle_in_a_small_block",
                      [] { launch(&all_lanes_shuffle, Launch{"all_lanes_shuffle", 1, 16, 0, nullptr}); });

__global__ void nothing() {}
void start(int64_t blocks, int threads, int shared_bytes, int capability = 70) {
  emulator::set_compute_capability(capability);
  struct Back {
    ~Back() { emulator::set_compute_capability(70); }
  } back;
  launch(&nothing, Launch{"nothing", blocks, threads, shared_bytes, nullptr});
}
const Add too_many_threads("too_many_threads", [] { start(1, 1056, 0); });
const Add over_bounds("more_threads_than_launch_bounds",
                      [] { launch(&nothing, Launch{"nothing", 1, 288, 0, nullptr, 256}); });
const Add no_threads("no_threads", [] { start(1, 0, 0); });
const Add odd_threads("threads_of_no_whole_warps", [] { start(1, 40, 0); });
const Add too_many_blocks("too_many_blocks", [] { start(0x80000000ll, 32, 0); });
const Add too_much_shared("too_much_shared_memory", [] { start(1, 32, 96 * 1024 + 16); });
const Add too_much_for_turing("too_much_shared_memory_for_turing", [] { start(1, 32, 65 * 1024, 75); });
const Add within_limits("launch_limits", [] {
  start(0, 32, 0);
  start(1, 1024, 96 * 1024);
  start(2, 7, 0);
  start(1, 64, 64 * 1024, 75);
  start(1, 64, 163 * 1024, 80);
  start(1, 64, 99 * 1024, 86);
  start(1, 64, 227 * 1024, 90);
});

__global__ void throws() {
  if (threadIdx.x == 17) throw std::out_of_range("from a kernel");
  __syncthreads();
}
const Add exception_of_kernel("exception_of_a_kernel", [] {
  for (int i = 0; i < 3; ++i) {
    try {
      launch(&throws, Launch{"throws", 2, 256, 0, nullptr});
      expect(false, "it did not come out");
    } catch (const std::out_of_range& error) {
      expect(error.what() == std::string("from a kernel"), "another came out");
    }
    run_pass_on<true>();  // and the machine works on
  }
});

}  // namespace testing
