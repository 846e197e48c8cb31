// Counts of kernels whose sectors and bank conflicts can be told by hand.
#include <algorithm>

#include "harness.h"

namespace testing {

using namespace inti;
using emulator::LaunchRecord;

template <class Run>
LaunchRecord record(Run run) {
  emulator::start_recording();
  run();
  const auto records = emulator::stop_recording();
  expect(records.size() == 1, "one launch");
  return records[0];
}
void equal(int64_t value, int64_t expected, const std::string& what) {
  expect(value == expected, what + " is " + std::to_string(value) + " in the place of " + std::to_string(expected));
}

// --- Sectors ---------------------------------------------------------------------------------------------------------

// out[i] = in[step·i] + in[0], 4 floats at a time.
__global__ void gather(const float* in, float* out, int step) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  auto sum = load<4>(in + 4 * step * i);
  sum[0] += load(in);
  store(out + 4 * i, sum);
  load<2>(out + 4 * i);
}
const Add sectors("sectors", [] {
  Array<float> memory(8192);
  float* in = memory.get() + (32 - reinterpret_cast<uintptr_t>(memory.get()) % 32) / 4;
  float* out = in + 4096;
  const auto counts =
      record([&] { launch(&gather, Launch{"gather", 4, 64, 0, nullptr}, static_cast<const float*>(in), out, 2); });
  expect(counts.kernel == "gather" && counts.blocks == 4 && counts.threads == 64 && counts.shared_bytes == 0,
         "the launch");
  equal(static_cast<int64_t>(counts.traffic.size()), 4, "blocks");
  for (int block = 0; block < 4; ++block) {
    const auto& traffic = counts.traffic[static_cast<size_t>(block)];
    // Each thread has a sector of its own in `in`; two share one in `out`. Blocks but the first also read in[0].
    std::vector<uint64_t> expected_read, expected_written, read, written;
    if (block) expected_read.push_back(reinterpret_cast<uintptr_t>(in) / 32);
    for (int i = 0; i < 64; ++i) expected_read.push_back(reinterpret_cast<uintptr_t>(in + 8 * (64 * block + i)) / 32);
    for (int i = 0; i < 32; ++i)
      expected_written.push_back(reinterpret_cast<uintptr_t>(out + 8 * (32 * block + i)) / 32);
    expected_read.insert(expected_read.end(), expected_written.begin(), expected_written.end());
    for (size_t i = 0; i < traffic.sectors.size(); ++i)
      (traffic.written[i] ? written : read).push_back(traffic.sectors[i]);
    std::sort(read.begin(), read.end());
    std::sort(written.begin(), written.end());
    expect(read == expected_read, "sectors read");
    expect(written == expected_written, "sectors written");
  }
  equal(counts.global_loads.of_16, 256, "16-byte loads");
  equal(counts.global_loads.of_8, 256, "8-byte loads");
  equal(counts.global_loads.of_4, 256, "4-byte loads");
  equal(counts.global_loads.of_2, 0, "2-byte loads");
  equal(counts.global_stores.of_16, 256, "16-byte stores");
});

// In the order of first touch, by a single thread.
__global__ void walk(const float* in, float* out) {
  for (int i : {24, 0, 25, 8, 3, 16}) store(out + i, load(in + i));
}
const Add first_touch("order_of_first_touch", [] {
  Array<float> memory(96);
  float* in = memory.get() + (32 - reinterpret_cast<uintptr_t>(memory.get()) % 32) / 4;
  const auto counts =
      record([&] { launch(&walk, Launch{"walk", 1, 1, 0, nullptr}, static_cast<const float*>(in), in + 32); });
  const uint64_t first = reinterpret_cast<uintptr_t>(in) / 32;
  const std::vector<uint64_t> expected{first + 3, first + 7, first,     first + 4,
                                       first + 1, first + 5, first + 2, first + 6};
  expect(counts.traffic[0].sectors == expected, "sectors");
  expect(counts.traffic[0].written == std::vector<bool>{0, 1, 0, 1, 0, 1, 0, 1}, "which of them were written");
});

const Add off("nothing_is_counted_unasked", [] {
  Array<float> memory(96);
  launch(&walk, Launch{"walk", 1, 1, 0, nullptr}, static_cast<const float*>(memory.get()), memory.get() + 32);
  emulator::start_recording();
  expect(emulator::stop_recording().empty(), "a record of an earlier launch");
  launch(&walk, Launch{"walk", 1, 1, 0, nullptr}, static_cast<const float*>(memory.get()), memory.get() + 32);
  expect(emulator::stop_recording().empty(), "a record of a later launch");
});

// --- Bank conflicts --------------------------------------------------------------------------------------------------

// Lane i takes N elements at step·i, `rounds` times over; lanes from `active` on take none.
template <class T, int N>
__global__ void stride(int step, int rounds, int active) {
  const auto tile = dynamic_shared<T>(0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int round = 0; round < rounds; ++round) {
    if (lane < active) load<N>(tile + step * lane);
  }
  __syncthreads();
  if (threadIdx.x < 32 && lane < active) store(tile + step * lane, Vec<T, N>{});
}
struct Expected {
  int64_t accesses, ideal, wavefronts;  // of one access by one warp
};
template <class T, int N>
void check_stride(int step, Expected one, int active = 32) {
  const int rounds = 5, warps = 3;
  const auto counts =
      record([&] { launch(&stride<T, N>, Launch{"stride", 2, 32 * warps, 32 * 1024, nullptr}, step, rounds, active); });
  const std::string what =
      std::to_string(sizeof(T) * N) + " bytes at steps of " + std::to_string(sizeof(T) * step) + ": ";
  equal(counts.shared_loads.accesses, 2 * warps * rounds * one.accesses, what + "loads");
  equal(counts.shared_loads.ideal, 2 * warps * rounds * one.ideal, what + "ideal");
  equal(counts.shared_loads.wavefronts, 2 * warps * rounds * one.wavefronts, what + "wavefronts");
  equal(counts.shared_stores.accesses, 2 * one.accesses, what + "stores");
  equal(counts.shared_stores.wavefronts, 2 * one.wavefronts, what + "wavefronts of stores");
}
const Add bank_conflicts("bank_conflicts", [] {
  check_stride<float, 1>(1, {1, 1, 1});
  check_stride<float, 1>(2, {1, 1, 2});
  check_stride<float, 1>(8, {1, 1, 8});
  check_stride<float, 1>(32, {1, 1, 32});
  check_stride<float, 1>(33, {1, 1, 1});
  check_stride<float16, 1>(1, {1, 1, 1});  // two lanes in a word
  check_stride<float16, 1>(64, {1, 1, 32});
  check_stride<float, 2>(2, {1, 2, 2});  // half warps
  check_stride<double, 1>(1, {1, 2, 2});
  check_stride<double, 1>(2, {1, 2, 4});
  check_stride<float, 4>(4, {1, 4, 4});  // quarter warps
  check_stride<float16, 8>(8, {1, 4, 4});
  check_stride<float16, 8>(64, {1, 4, 32});
  check_stride<float16, 8>(72, {1, 4, 4});  // rows of 128 bytes and 16 bytes of padding
  check_stride<float, 4>(4, {1, 2, 2}, 16);
  check_stride<float, 1>(32, {1, 1, 4}, 4);
});

// All lanes read one word; loads also race with nothing.
__global__ void broadcast() {
  const auto tile = dynamic_shared<float>(0);
  load<4>(tile + 64);
  load(tile + 5);
}
const Add broadcasts("broadcasts", [] {
  const auto counts = record([] { launch(&broadcast, Launch{"broadcast", 1, 64, 1024, nullptr}); });
  equal(counts.shared_loads.accesses, 4, "loads");
  equal(counts.shared_loads.wavefronts, 10, "wavefronts");
});

// Lanes that go round a loop more or less often are matched at each place, round by round.
__global__ void ragged() {
  const auto tile = dynamic_shared<float>(0);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i <= lane / 8; ++i) {
    if (lane % 2) load(tile + lane);
    load(tile + 32 * lane);
  }
}
const Add ragged_loops("bank_conflicts_of_ragged_loops", [] {
  const auto counts = record([] { launch(&ragged, Launch{"ragged", 1, 32, 4096, nullptr}); });
  equal(counts.shared_loads.accesses, 8, "loads");
  equal(counts.shared_loads.wavefronts, 4 + 32 + 24 + 16 + 8, "wavefronts");
});

// Sixteen rows of 32 bytes: those that begin in one bank conflict, whatever the layout.
__global__ void load_a(int pitch) {
  FragmentA<float16> a;
  load_fragment(a, dynamic_shared<float16>(0), pitch);
}
const Add fragment_conflicts("bank_conflicts_of_fragments", [] {
  const auto wavefronts = [](int pitch) {
    const auto counts = record([&] { launch(&load_a, Launch{"load_a", 1, 32, 16384, nullptr}, pitch); });
    equal(counts.shared_loads.accesses, 2, "loads");
    equal(counts.shared_loads.ideal, 8, "ideal");
    return counts.shared_loads.wavefronts;
  };
  equal(wavefronts(64), 32, "rows 128 bytes apart");
  equal(wavefronts(32), 16, "rows 64 bytes apart");
  equal(wavefronts(72), 8, "rows 144 bytes apart");
});

}  // namespace testing
