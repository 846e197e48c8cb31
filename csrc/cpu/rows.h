// Rows of channels, a vector at a time.
#pragma once

#include "inti/token_blocks.h"
#include "parallel.h"
#include "vec.h"

namespace inti::INTI_ISA {
namespace {

INTI_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INTI_INLINE int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Calls block(c, load, store) for every vector of channels of what T is computed in; load and store handle a last
// vector that isn't full.
template <class T, class Block>
INTI_INLINE void for_each_vector(int64_t dim, const Block& block) {
  using A = wide_t<T>;
  constexpr int lanes = kLanes<A>;
  int64_t c = 0;
  for (; c + lanes <= dim; c += lanes)
    block(
        c, [](const auto* p) __attribute__((always_inline)) { return load(p); },
        [](auto* p, const Vec<A>& v) __attribute__((always_inline)) { store(p, v); });
  if (const int rest = int(dim - c); rest > 0)
    block(
        c, [rest](const auto* p) __attribute__((always_inline)) { return load_first(p, rest); },
        [rest](auto* p, const Vec<A>& v) __attribute__((always_inline)) { store_first(p, v, rest); });
}

// A sum in each lane, in double: where all terms are of one sign, sums of a few hundred would lose more than PyTorch's.
template <class A>
class LongSum {
 public:
  __attribute__((always_inline)) void add(const Vec<A>& terms) {
    for (int i = 0; i < kLanes<A>; ++i) sums_[i] += terms[i];
  }
  __attribute__((always_inline)) Vec<A> total() const {
    A lanes[kLanes<A>];
    for (int i = 0; i < kLanes<A>; ++i) lanes[i] = A(sums_[i]);
    return load(lanes);
  }

 private:
  double sums_[kLanes<A>] = {};
};

// v with zeros in the lanes past the row's end, whatever they were; `load` is the one that the vector came with.
template <class A, class Load>
INTI_INLINE Vec<A> inside(const Load& load, const Vec<A>& v) {
  A lanes[kLanes<A>];
  store(lanes, v);
  return load(lanes);
}

template <class T>
INTI_INLINE const T* token(const void* base, const Strides& strides, int64_t batch, int64_t frame, int64_t index) {
  return static_cast<const T*>(base) + batch * strides.batch + frame * strides.frame + index * strides.token;
}

// A block of tokens of one frame (or pair of frames): the unit of work, and of partial sums.
struct Block {
  int64_t frame;       // over all clips
  int64_t begin, end;  // tokens
  int64_t number;      // over all frames: where its partial sums go
};

// Calls task(block) for the blocks of `count` frames from `first` on.
template <class Task>
void for_each_block(int64_t first, int64_t count, int64_t tokens, int threads, const Task& task) {
  const int64_t blocks = token_blocks(tokens);
  parallel_for(count * blocks, threads, [&](int64_t i) {
    const int64_t frame = first + i / blocks, begin = i % blocks * kTokensOfBlock;
    task(Block{frame, begin, least(begin + kTokensOfBlock, tokens), frame * blocks + i % blocks});
  });
}

}  // namespace
}  // namespace inti::INTI_ISA
