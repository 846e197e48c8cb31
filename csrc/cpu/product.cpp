// Plain matrix products.
#include "inti/product.h"

#include "gemm.h"

namespace inti::INTI_ISA {

void product(const Product& p) {
  const int64_t part = parts_of(p.depth, parts_of(p.depth, kProductDepth));
  for (int64_t k = 0; k < p.depth; k += part) {
    const bool add = p.accumulate || k > 0;
    const int64_t depth = least(part, p.depth - k);
    const Lines a{p.a + k * p.a_strides[1], p.a_strides[0], p.a_strides[1], p.rows, depth};
    const Lines b{p.b + k * p.b_strides[0], p.b_strides[1], p.b_strides[0], p.columns, depth};
    gemm(
        b, p.rows, p.threads, p.workspace,
        [&](int64_t row, float* to, float*) __attribute__((always_inline)) { pack_panel<kTileRows>(a, row, to); },
        [&](int64_t row, int64_t column, int64_t count, const float* sums, float*) __attribute__((always_inline)) {
          float* to = p.c + row * p.c_pitch + column;
          for_each_vector<float>(count, [&](int64_t c, auto load, auto store) __attribute__((always_inline)) {
            store(to + c, add ? load(to + c) + load(sums + c) : load(sums + c));
          });
        },
        [](int64_t, float*) {});
  }
}

}  // namespace inti::INTI_ISA
