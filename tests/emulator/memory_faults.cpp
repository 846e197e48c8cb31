// Memory used wrongly: bounds, alignment, races; fragments too.
#include <cmath>

#include "harness.h"

namespace testing {

using namespace inti;

// --- Global memory ---------------------------------------------------------------------------------------------------

template <int N>
__global__ void copy(const float* from, float* to) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  store(to + i, load<N>(from + i));
}
template <int N>
void run_copy(int64_t size, int64_t offset_from, int64_t offset_to, int64_t blocks) {
  Array<float> from(size), to(size);
  for (int64_t i = 0; i < size; ++i) from[i] = static_cast<float>(i);
  launch(&copy<N>, Launch{"copy", blocks, 32, 0, nullptr}, static_cast<const float*>(from.get() + offset_from),
         to.get() + offset_to);
  for (int64_t i = 0; i < blocks * 32 * N; ++i) expect(to[i + offset_to] == from[i + offset_from], "copied wrongly");
}
const Add copies("copy", [] {
  run_copy<1>(1000, 3, 1, 5);
  run_copy<2>(1000, 2, 6, 5);
  run_copy<4>(1000, 8, 4, 5);
});
const Add misaligned_load("misaligned_global_load", [] { run_copy<4>(1000, 2, 0, 2); });
const Add misaligned_store("misaligned_global_store", [] { run_copy<2>(1000, 0, 1, 2); });
const Add null_load("null_pointer", [] {
  Array<float> to(64);
  launch(&copy<1>, Launch{"copy", 1, 32, 0, nullptr}, static_cast<const float*>(nullptr), to.get());
});
#ifdef __SANITIZE_ADDRESS__
const Add load_past("global_load_out_of_bounds", [] { run_copy<1>(60, 0, -60, 2); });
const Add store_past("global_store_out_of_bounds", [] {
  Array<float> from(64), to(60);
  launch(&copy<4>, Launch{"copy", 1, 16, 0, nullptr}, static_cast<const float*>(from.get()), to.get());
});
#endif

// --- Shared memory ---------------------------------------------------------------------------------------------------

template <int N, bool STORE>
__global__ void touch(int first, int step) {
  const auto at = dynamic_shared<float>(0) + (first + step * static_cast<int>(threadIdx.x));
  if (STORE) {
    store(at, Vec<float, N>{});
  } else {
    load<N>(at);
  }
}
template <int N, bool STORE>
void run_touch(int first, int step) {
  launch(&touch<N, STORE>, Launch{"touch", 2, 32, 512, nullptr}, first, step);
}
const Add touches("shared_memory", [] {
  run_touch<4, true>(0, 4);
  run_touch<4, false>(0, 4);
  run_touch<2, true>(6, 2);
  run_touch<1, false>(0, 0);
});
const Add load_past_shared("shared_load_out_of_bounds", [] { run_touch<1, false>(97, 1); });
const Add store_past_shared("shared_store_out_of_bounds", [] { run_touch<4, true>(4, 4); });
const Add before_shared("shared_load_before_the_start", [] { run_touch<1, false>(-1, 1); });
const Add misaligned_shared("misaligned_shared_load", [] { run_touch<4, false>(2, 0); });
const Add misaligned_shared_store("misaligned_shared_store", [] { run_touch<2, true>(1, 2); });

__global__ void read_uninitialised(float* out) {
  const int i = static_cast<int>(threadIdx.x);
  const auto tile = dynamic_shared<float>(0);
  store(out + (64 * blockIdx.x + threadIdx.x), load(tile + i));
  __syncthreads();
  store(tile + i, 1.0f);  // which the next block must not find
}
const Add uninitialised("uninitialised_shared_memory", [] {
  Array<float> out(128);
  launch(&read_uninitialised, Launch{"read_uninitialised", 2, 64, 256, nullptr}, out.get());
  for (int i = 0; i < 128; ++i) expect(std::isnan(out[i]), "it is not NaN");
});

// --- Races -----------------------------------------------------------------------------------------------------------

enum class Order {
  write_write,
  write_after_read,
  write_after_many_read,
  read_after_write_in_warp,
  syncwarp_twin,
  shuffle_is_no_barrier,
  wrong_half_synced,
  half_synced_twin,
  chain_of_syncs_twin,
  write_after_warp_read,
  write_after_warp_read_twin,
  own_bytes_twin,
  halves_twin,
  halves,
};
template <Order ORDER>
__global__ void in_order() {
  const int i = static_cast<int>(threadIdx.x), lane = i % 32;
  const unsigned low = 0x0000ffffu;
  const auto tile = dynamic_shared<float>(0);
  const auto halves = dynamic_shared<float16>(0);
  switch (ORDER) {
    case Order::write_write:
      store(tile + i / 2, 1.0f);
      break;
    case Order::write_after_read:
      store(tile + i, 1.0f);
      __syncthreads();
      load(tile + (i + 32) % 64);
      store(tile + i, 2.0f);
      break;
    case Order::write_after_many_read:
      load(tile);
      if (i == 33) store(tile, 2.0f);
      break;
    case Order::read_after_write_in_warp:
      store(tile + i, 1.0f);
      load(tile + (i ^ 1));
      break;
    case Order::syncwarp_twin:
      for (int round = 0; round < 3; ++round) {
        store(tile + i, 1.0f);
        __syncwarp();
        load(tile + (i ^ 1));
        __syncwarp();
      }
      break;
    case Order::shuffle_is_no_barrier:
      store(tile + i, 1.0f);
      __shfl_sync(0xffffffffu, 1, 0);
      load(tile + (i ^ 1));
      break;
    case Order::wrong_half_synced:
      store(tile + i, 1.0f);
      if (lane < 16) __syncwarp(low);
      load(tile + (i ^ 16));
      break;
    case Order::half_synced_twin:
      store(tile + i, 1.0f);
      if (lane < 16) {
        __syncwarp(low);
        load(tile + (i ^ 8));
      } else {
        __syncwarp(~low);
        load(tile + (i ^ 4));
      }
      break;
    case Order::chain_of_syncs_twin:  // lane 0 → lane 1 → lane 2, by two barriers of two lanes
      if (lane == 0) store(tile + i, 1.0f);
      if (lane <= 1) __syncwarp(3);
      if (lane == 1 || lane == 2) __syncwarp(6);
      if (lane == 2) load(tile + (i - 2));
      break;
    case Order::write_after_warp_read:
      load(tile + i / 32);
      __syncthreads();
      load(tile + i / 32);
      if (lane == 3) store(tile + i / 32, 1.0f);
      break;
    case Order::write_after_warp_read_twin:
      load(tile + i / 32);
      __syncwarp();
      if (lane == 3) store(tile + i / 32, 1.0f);
      __syncwarp();
      load(tile + i / 32);
      break;
    case Order::own_bytes_twin:
      store(tile + i, 1.0f);
      load(tile + i);
      store(tile + i, 2.0f);
      break;
    case Order::halves_twin:  // two threads in one word; 16 bytes first
      if (i < 4) store(tile + 4 * i, Vec<float, 4>{});
      __syncthreads();
      store(halves + i, float16{0});
      load(halves + i);
      break;
    case Order::halves:
      store(halves + i, float16{0});
      if (i % 2 == 0) load(tile + i / 2);
      break;
  }
}
template <Order ORDER>
void run_in_order() {
  in_every_order([] { launch(&in_order<ORDER>, Launch{"in_order", 2, 64, 256, nullptr}); });
}
const Add race1("race_of_writes", &run_in_order<Order::write_write>);
const Add race2("race_of_write_after_read", &run_in_order<Order::write_after_read>);
const Add race3("race_of_write_after_many_read", &run_in_order<Order::write_after_many_read>);
const Add race4("race_in_a_warp", &run_in_order<Order::read_after_write_in_warp>);
const Add race5("race_around_a_shuffle", &run_in_order<Order::shuffle_is_no_barrier>);
const Add race6("race_of_the_other_half", &run_in_order<Order::wrong_half_synced>);
const Add race7("race_of_write_after_warp_read", &run_in_order<Order::write_after_warp_read>);
const Add race8("race_of_halves", &run_in_order<Order::halves>);
const Add order1("syncwarp_orders", &run_in_order<Order::syncwarp_twin>);
const Add order2("syncwarp_of_halves_orders", &run_in_order<Order::half_synced_twin>);
const Add order3("syncwarps_in_a_chain_order", &run_in_order<Order::chain_of_syncs_twin>);
const Add order4("syncwarp_orders_the_warp", &run_in_order<Order::write_after_warp_read_twin>);
const Add order5("own_bytes_are_no_race", &run_in_order<Order::own_bytes_twin>);
const Add order6("two_halves_of_a_word_are_no_race", &run_in_order<Order::halves_twin>);

// --- Fragments -------------------------------------------------------------------------------------------------------

struct Tiles {
  int offset = 0, pitch = 16;  // of A, in bytes and elements
  int offset_sums = 1024, pitch_sums = 16;
  bool barrier = true, fewer_lanes = false, other_lanes = false;
};
template <class T>
__global__ void square(Tiles tiles) {
  const int lane = static_cast<int>(threadIdx.x);
  const auto halves = dynamic_shared<T>(0);
  for (int i = lane; i < 512; i += 32) store(halves + i, narrow<T>(1.0f));
  if (tiles.barrier) __syncwarp();
  FragmentA<T> a;
  FragmentB<T> b;
  FragmentSum sums;
  const int other = tiles.other_lanes && lane == 5 ? 32 : 0;
  load_fragment(a, dynamic_shared<T>(tiles.offset + other), tiles.pitch);
  load_fragment(b, dynamic_shared<T>(0), 16);
  wmma::fill_fragment(sums, 0.0f);
  if (tiles.fewer_lanes && lane == 7) return;
  wmma::mma_sync(sums, a, b, sums);
  store_fragment(dynamic_shared<float>(tiles.offset_sums), sums, tiles.pitch_sums);
  if (tiles.barrier) __syncwarp();
  load(dynamic_shared<float>(1024) + 255);
}
template <class T = float16>
void run_square(const Tiles& tiles) {
  in_every_order([&] { launch(&square<T>, Launch{"square", 2, 32, 3072, nullptr}, tiles); });
}
const Add fragments("fragments", [] { run_square({}); });
const Add fragment_alignment("misaligned_fragment", [] { run_square({16}); });
const Add fragment_pitch("fragment_pitch", [] { run_square({0, 20}); });
const Add sums_pitch("fragment_pitch_of_sums", [] { run_square({0, 16, 1024, 18}); });
const Add fragment_bounds("fragment_out_of_bounds", [] { run_square({2816}); });
const Add sums_bounds("fragment_store_out_of_bounds", [] { run_square({0, 16, 2560}); });
const Add fragment_lanes("mma_of_absent_lane", [] { run_square({0, 16, 1024, 16, true, true}); });
const Add fragment_trail("fragments_of_different_places", [] { run_square({0, 16, 1024, 16, true, false, true}); });
const Add fragment_race("race_of_fragments", [] { run_square({0, 16, 1024, 16, false}); });
const Add bfloat16_mma("mma_of_bfloat16_before_ampere", [] { run_square<bfloat16>({}); });
const Add bfloat16_mma_twin("mma_of_bfloat16", [] {
  emulator::set_compute_capability(80);
  run_square<bfloat16>({});
  emulator::set_compute_capability(70);
});

}  // namespace testing
