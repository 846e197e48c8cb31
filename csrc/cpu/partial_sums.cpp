// Partial sums to gradients.
#include "inti/token_blocks.h"
#include "parallel.h"
#include "vec.h"

namespace inti::INTI_ISA {
namespace {

constexpr int64_t kColumns = 256;  // of a task: what it adds to stays in the first cache

template <class A>
void add_up(const PartialSums& p) {
  const int64_t parts = (p.columns + kColumns - 1) / kColumns;
  parallel_for(p.count * parts, p.threads, [&](int64_t i) {
    const int64_t row = i / parts, begin = i % parts * kColumns;
    const int64_t end = begin + kColumns < p.columns ? begin + kColumns : p.columns;
    const A* term = static_cast<const A*>(p.partials) + row * p.terms * p.columns;
    A* to = static_cast<A*>(p.sums) + row * p.columns;
    // In double: where all terms are of one sign, the sums of a few hundred would lose more than PyTorch's do.
    double sums[kColumns] = {};
    for (int64_t k = 0; k < p.terms; ++k, term += p.columns)
      for (int64_t c = begin; c < end; ++c) sums[c - begin] += term[c];
    for (int64_t c = begin; c < end; ++c) to[c] = A(sums[c - begin]);
  });
}

}  // namespace

void partial_sums(const PartialSums& p) { p.dtype == DType::float64 ? add_up<double>(p) : add_up<float>(p); }

}  // namespace inti::INTI_ISA
