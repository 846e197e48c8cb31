// What kernels that are right may rely on: shuffles, votes, atomics, products of fragments, and that blocks and threads
// all run, in the order of a seed.
#include <algorithm>
#include <random>
#include <set>
#include <thread>

#include "harness.h"

namespace testing {

using namespace inti;

// --- Shuffles and votes ----------------------------------------------------------------------------------------------

enum class Way { index, up, down, across };

template <Way WAY, class T>
__global__ void shuffle(const T* in, T* out, int by, int width) {
  const T value = load(in + threadIdx.x);
  T other{};
  if (WAY == Way::index) other = __shfl_sync(0xffffffffu, value, by, width);
  if (WAY == Way::up) other = __shfl_up_sync(0xffffffffu, value, static_cast<unsigned>(by), width);
  if (WAY == Way::down) other = __shfl_down_sync(0xffffffffu, value, static_cast<unsigned>(by), width);
  if (WAY == Way::across) other = __shfl_xor_sync(0xffffffffu, value, by, width);
  store(out + threadIdx.x, other);
}

// The lane that CUDA's manual names, by segments of `width`.
int source_of(Way way, int lane, int by, int width) {
  const int segment = lane / width, inside = lane % width;
  int wanted = 0;
  if (way == Way::index) return segment * width + by % width;
  if (way == Way::up) wanted = inside - by;
  if (way == Way::down) wanted = inside + by;
  if (way == Way::across) return (lane ^ by) / width > segment ? lane : lane ^ by;
  return wanted < 0 || wanted >= width ? lane : segment * width + wanted;
}

template <Way WAY, class T>
void check_shuffles() {
  Array<T> in(96), out(96);
  for (int i = 0; i < 96; ++i) in[i] = static_cast<T>(1000 + i) / 2;
  for (int width = 2; width <= 32; width *= 2) {
    for (int by = 0; by < 32; ++by) {
      launch(&shuffle<WAY, T>, Launch{"shuffle", 1, 96, 0, nullptr}, static_cast<const T*>(in.get()), out.get(), by,
             width);
      for (int i = 0; i < 96; ++i) {
        expect(out[i] == in[i / 32 * 32 + source_of(WAY, i % 32, by, width)],
               "lane " + std::to_string(i) + " by " + std::to_string(by) + " width " + std::to_string(width));
      }
    }
  }
}
const Add shuffles("shuffles", [] {
  check_shuffles<Way::index, int>();
  check_shuffles<Way::up, unsigned>();
  check_shuffles<Way::down, float>();
  check_shuffles<Way::across, double>();
  check_shuffles<Way::across, long long>();
});

// Halves of a warp that go different ways, and meet again.
__global__ void part_ways(unsigned* out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  unsigned sum = threadIdx.x;
  if (lane < 16) {
    for (int by = 8; by > 0; by /= 2) sum += __shfl_xor_sync(0x0000ffffu, sum, by);
  } else {
    sum = __shfl_sync(0xffff0000u, sum, 16);
    sum += __ballot_sync(0xffff0000u, lane % 2);
  }
  sum += __shfl_down_sync(0xffffffffu, sum, 16);
  store(out + threadIdx.x, sum);
}
const Add partial_masks("partial_masks", [] {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    emulator::set_seed(seed);
    Array<unsigned> out(64);
    launch(&part_ways, Launch{"part_ways", 1, 64, 0, nullptr}, out.get());
    for (unsigned i = 0; i < 64; ++i) {
      const unsigned first = i / 32 * 32, low = 16 * first + 120, high = first + 16 + 0xaaaa0000u;
      expect(out[i] == (i % 32 < 16 ? low + high : 2 * high), "lane " + std::to_string(i));
    }
  }
});

__global__ void votes(unsigned* out) {
  const int i = static_cast<int>(threadIdx.x);
  store(out + 3 * i, __ballot_sync(0xffffffffu, i % 3 == 0));
  store(out + (3 * i + 1), static_cast<unsigned>(__any_sync(0xffffffffu, i == 40)));
  store(out + (3 * i + 2), static_cast<unsigned>(__all_sync(0xffffffffu, i < 40)));
}
const Add vote("votes", [] {
  Array<unsigned> out(192);
  launch(&votes, Launch{"votes", 1, 64, 0, nullptr}, out.get());
  for (int i = 0; i < 64; ++i) {
    unsigned ballot = 0;
    for (int lane = 0; lane < 32; ++lane) ballot |= (i / 32 * 32 + lane) % 3 == 0 ? 1u << lane : 0;
    expect(out[3 * i] == ballot, "ballot");
    expect(out[3 * i + 1] == (i >= 32), "any");
    expect(out[3 * i + 2] == (i < 32), "all");
  }
});

// --- Grids, orders, atomics ------------------------------------------------------------------------------------------

__global__ void count(int* total, unsigned* visits, unsigned long long* sum) {
  atomicAdd(total, -1);
  atomicAdd(visits + (blockIdx.x * blockDim.x + threadIdx.x), 1u);
  atomicAdd(sum, 0x100000000ull * gridDim.x);
}
const Add atomics("atomics", [] {
  Array<int> total(1);
  Array<unsigned> visits(37 * 96);
  Array<unsigned long long> sum(1);
  launch(&count, Launch{"count", 37, 96, 0, nullptr}, total.get(), visits.get(), sum.get());
  expect(total[0] == -37 * 96 && sum[0] == 0x100000000ull * 37 * 37 * 96, "sums");
  for (int i = 0; i < 37 * 96; ++i) expect(visits[i] == 1, "a thread ran once and all did");
});

// Where each thread was in the order, before and after a barrier.
__global__ void note_order(unsigned* next, int* order) {
  const int at = static_cast<int>(atomicAdd(next, 1u));
  store(order + at, static_cast<int>(threadIdx.x));
  __syncthreads();
  const int again = static_cast<int>(atomicAdd(next, 1u));
  store(order + again, static_cast<int>(threadIdx.x));
}
std::vector<int> order_of(uint64_t seed) {
  emulator::set_seed(seed);
  Array<unsigned> next(1);
  Array<int> order(512);
  launch(&note_order, Launch{"note_order", 1, 256, 0, nullptr}, next.get(), order.get());
  return {order.get(), order.get() + 512};
}
const Add orders("orders_of_threads", [] {
  std::set<std::vector<int>> seen;
  std::set<int> first_warps;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const auto order = order_of(seed);
    expect(order == order_of(seed), "a seed gives one order");
    expect(!std::equal(order.begin(), order.begin() + 256, order.begin() + 256), "a barrier shuffles");
    for (int half = 0; half < 2; ++half) {
      std::vector<int> sorted(order.begin() + 256 * half, order.begin() + 256 * (half + 1));
      first_warps.insert(sorted[0] / 32);
      std::sort(sorted.begin(), sorted.end());
      for (int i = 0; i < 256; ++i)
        expect(sorted[static_cast<size_t>(i)] == i, "all threads come, before and behind it");
    }
    seen.insert(order);
  }
  expect(seen.size() == 20, "seeds give different orders");
  expect(first_warps.size() >= 4, "every warp may come first");
});

__global__ void reverse(const int* in, int* out) {
  const int i = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
  const auto tile = dynamic_shared<int>(0);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * n;
  for (int round = 0; round < 3; ++round) {
    store(tile + i, load(round ? out + (first + i) : in + (first + i)));
    __syncthreads();
    store(out + (first + i), load(tile + (n - 1 - i)));
    __syncthreads();
  }
}
void check_reverse(int threads) {
  Array<int> in(20 * threads), out(20 * threads);
  for (int i = 0; i < 20 * threads; ++i) in[i] = i;
  launch(&reverse, Launch{"reverse", 20, threads, 4 * threads, nullptr}, static_cast<const int*>(in.get()), out.get());
  for (int i = 0; i < 20 * threads; ++i) {
    expect(out[i] == i / threads * threads + threads - 1 - i % threads, "a number went astray");
  }
}
const Add block_sizes("block_sizes", [] {
  for (int threads : {1, 2, 31, 32, 64, 96, 256, 1024}) check_reverse(threads);
});
const Add concurrent("launches_by_two_threads", [] {
  std::vector<std::thread> threads;
  std::vector<std::string> errors(2);
  for (int i = 0; i < 2; ++i) {
    threads.emplace_back([&errors, i] {
      try {
        for (int round = 0; round < 20; ++round) check_reverse(64);
      } catch (const std::exception& error) {
        errors[static_cast<size_t>(i)] = error.what();
      }
    });
  }
  for (auto& thread : threads) thread.join();
  expect(errors[0].empty() && errors[1].empty(), errors[0] + errors[1]);
});

// --- Fragments -------------------------------------------------------------------------------------------------------

// d = 2·(a·b) + 1 twice over k, with pitches wider than the tiles.
template <class T>
__global__ void product(const T* a, const T* b, float* d) {
  const int lane = static_cast<int>(threadIdx.x);
  const auto tile_a = dynamic_shared<T>(0), tile_b = dynamic_shared<T>(2048);  // [16, 32] with pitch 40, 48
  const auto tile_d = dynamic_shared<float>(4096);                             // [16, 16] with pitch 20
  for (int i = lane; i < 512; i += 32) {
    store(tile_a + (i / 32 * 40 + i % 32), load(a + i));
    store(tile_b + (i / 32 * 48 + i % 32), load(b + i));
  }
  __syncwarp();
  FragmentSum sums;
  wmma::fill_fragment(sums, 0.0f);
  for (int k = 0; k < 32; k += 16) {
    FragmentA<T> of_a;
    FragmentB<T> of_b;
    load_fragment(of_a, tile_a + k, 40);
    load_fragment(of_b, tile_b + k, 48);
    wmma::mma_sync(sums, of_a, of_b, sums);
  }
  for (int i = 0; i < sums.num_elements; ++i) sums.x[i] = 2 * sums.x[i] + 1;
  store_fragment(tile_d, sums, 20);
  __syncwarp();
  for (int i = lane; i < 256; i += 32) store(d + i, load(tile_d + (i / 16 * 20 + i % 16)));
}
template <class T>
void check_product() {
  Array<T> a(512), b(512);
  Array<float> d(256);
  std::mt19937 random(3);
  for (int i = 0; i < 512; ++i) {  // small whole numbers, whose sums are exact
    a[i] = narrow<T>(static_cast<float>(random() % 33) - 16);
    b[i] = narrow<T>(static_cast<float>(random() % 33) - 16);
  }
  launch(&product<T>, Launch{"product", 1, 32, 8192, nullptr}, static_cast<const T*>(a.get()),
         static_cast<const T*>(b.get()), d.get());
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      float sum = 0;
      for (int k = 0; k < 32; ++k) sum += widen(a[32 * m + k]) * widen(b[32 * n + k]);
      expect(d[16 * m + n] == 2 * sum + 1, "element " + std::to_string(m) + ", " + std::to_string(n));
    }
  }
}
const Add products("products_of_fragments", [] {
  check_product<float16>();
  emulator::set_compute_capability(80);
  check_product<bfloat16>();
  emulator::set_compute_capability(70);
});

// Every half there is, infinities and subnormals too, through a product with the identity.
__global__ void identity(const float16* a, float* d) {
  const int lane = static_cast<int>(threadIdx.x);
  const auto tile = dynamic_shared<float16>(0), one = dynamic_shared<float16>(512);
  for (int i = lane; i < 256; i += 32) {
    store(tile + i, load(a + (256 * blockIdx.x + i)));
    store(one + i, narrow<float16>(i % 17 == 0 ? 1.0f : 0.0f));
  }
  __syncwarp();
  FragmentA<float16> of_a;
  FragmentB<float16> of_b;
  FragmentSum sums;
  load_fragment(of_a, tile, 16);
  load_fragment(of_b, one, 16);
  wmma::fill_fragment(sums, 0.0f);
  wmma::mma_sync(sums, of_a, of_b, sums);
  store_fragment(dynamic_shared<float>(1024), sums, 16);
  __syncwarp();
  for (int i = lane; i < 256; i += 32) store(d + (256 * blockIdx.x + i), load(dynamic_shared<float>(1024) + i));
}
const Add every_half("every_half_in_a_fragment", [] {
  Array<float16> a(0x10000);
  Array<float> d(0x10000);
  // One number in a row, for infinity times 0 is NaN.
  for (int i = 0; i < 0x10000; i += 16) {
    for (int number = 0; number < 16; ++number) {
      for (int k = 0; k < 16; ++k) a[i + k] = {0};
      a[i + number].bits = static_cast<unsigned short>(i + number);
    }
  }
  for (int shift = 0; shift < 16; ++shift) {
    for (int i = 0; i < 0x10000; ++i) a[i].bits = static_cast<unsigned short>(i % 16 == shift ? i : 0);
    launch(&identity, Launch{"identity", 256, 32, 2048, nullptr}, static_cast<const float16*>(a.get()), d.get());
    for (int i = shift; i < 0x10000; i += 16) {
      const float expected = widen(a[i]);
      if (expected - expected == 0) {
        expect(d[i] == expected, "half " + std::to_string(i));
      } else {
        expect(d[i] != d[i] || d[i] == expected, "half " + std::to_string(i));
      }
    }
  }
});

// Code that takes the layout of an accumulator for granted goes wrong.
template <bool BY_THE_BOOK>
__global__ void row_sums(float* out) {
  const int lane = static_cast<int>(threadIdx.x);
  const auto tile = dynamic_shared<float16>(0), one = dynamic_shared<float16>(512);
  for (int i = lane; i < 256; i += 32) {
    store(tile + i, narrow<float16>(static_cast<float>(i)));
    store(one + i, narrow<float16>(i % 17 == 0 ? 1.0f : 0.0f));
  }
  __syncwarp();
  FragmentA<float16> a;
  FragmentB<float16> b;
  FragmentSum sums;
  load_fragment(a, tile, 16);
  load_fragment(b, one, 16);
  wmma::fill_fragment(sums, 0.0f);
  wmma::mma_sync(sums, a, b, sums);
  float total = 0;
  if (BY_THE_BOOK) {
    store_fragment(dynamic_shared<float>(1024), sums, 16);
    __syncwarp();
    for (int i = 0; i < 8; ++i) total += load(dynamic_shared<float>(1024) + (8 * lane + i));
  } else {
    for (int i = 0; i < 8; ++i) total += sums.x[i];  // as if a lane had half a row
  }
  store(out + lane, total);
}
template <bool BY_THE_BOOK>
bool row_sums_are_right() {
  Array<float> out(32);
  launch(&row_sums<BY_THE_BOOK>, Launch{"row_sums", 1, 32, 2048, nullptr}, out.get());
  bool right = true;
  for (int i = 0; i < 32; ++i) right &= out[i] == static_cast<float>(64 * i + 28);
  return right;
}
const Add layouts("layout_of_fragments", [] {
  expect(row_sums_are_right<true>(), "by way of shared memory");
  expect(!row_sums_are_right<false>(), "the layout is the plain one");
});

}  // namespace testing
