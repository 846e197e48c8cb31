// Linears of a few rows, with what stands around them.
#include "inti/few_rows.h"

#include "gelu.h"
#include "layer_norm.h"

namespace inti::INTI_ISA {
namespace {

constexpr int64_t kOutputs = 32;   // of a task in the forward
constexpr int64_t kGradients = 8;  // of a task that writes the weight's gradient: outputs
constexpr int64_t kInputs = 128;   // of a task that reads the weight by columns: it does so in strips of these,
constexpr int64_t kLines = 8;      // so many lines at a time, which stay in the first cache at any pitch
constexpr int64_t kTerms = 32;     // rows that are added up in one go: sums of sums round less than one long sum

template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls block(Count, row) for rows [begin, end), at most eight at a time: what is loaded for them is used for each.
template <int N = 8, class Block>
INTI_INLINE void for_each_rows(int64_t begin, int64_t end, const Block& block) {
  for (; begin + N <= end; begin += N) block(Count<N>{}, begin);
  if constexpr (N > 1) for_each_rows<N / 2>(begin, end, block);
}

// Calls task(begin, end) for every part of [0, count).
template <class Task>
void for_each_part(int64_t count, int64_t size, int threads, const Task& task) {
  parallel_for(parts_of(count, size), threads, [&](int64_t i) { task(i * size, least((i + 1) * size, count)); });
}

template <class A, class Pass>
void normalize(const Pass& p) {
  const int64_t dim = p.shape.in;
  parallel_for(p.shape.rows, p.shape.threads, [&](int64_t row) {
    const A* x = static_cast<const A*>(p.x) + row * dim;
    A* normalized = static_cast<A*>(p.normalized) + row * dim;
    const Statistics<A> now = statistics_of<A>(
        [&](int64_t c, const auto& load) __attribute__((always_inline)) { return load(x + c); }, dim, p.eps);
    static_cast<A*>(p.statistics)[2 * row] = now.mean;
    static_cast<A*>(p.statistics)[2 * row + 1] = now.scale;
    for_each_vector<A>(dim, [&](int64_t c, auto load, auto store) __attribute__((always_inline)) {
      const Vec<A> v = (load(x + c) - now.mean) * now.scale;
      store(normalized + c,
            v * load(static_cast<const A*>(p.norm_weight) + c) + load(static_cast<const A*>(p.norm_bias) + c));
    });
  });
}

template <class A, class W>
void forward(const FewRowsForward& p) {
  const FewRowsShape& s = p.shape;
  if (p.norm_weight) normalize<A>(p);
  const A* input = static_cast<const A*>(p.norm_weight ? p.normalized : p.x);
  for_each_part(s.out, kOutputs, s.threads, [&](int64_t begin, int64_t end) {
    for_each_rows(0, s.rows, [&](auto count, int64_t row) __attribute__((always_inline)) {
      constexpr int kRows = decltype(count)::value;
      A products[kRows][kOutputs];
      for (int64_t n = begin; n < end; ++n) {
        const W* weight = static_cast<const W*>(p.weight) + n * p.weight_pitch;
        Vec<A> sums[kRows] = {};
        for_each_vector<A>(s.in, [&](int64_t c, auto load, auto) __attribute__((always_inline)) {
          const Vec<A> w = load(weight + c);
          for (int r = 0; r < kRows; ++r) sums[r] += load(input + (row + r) * s.in + c) * w;
        });
        for (int r = 0; r < kRows; ++r) products[r][n - begin] = sum_lanes<A>(sums[r]);
      }
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = (row + r) * s.out + begin;
        for_each_vector<A>(end - begin, [&](int64_t c, auto load, auto store) __attribute__((always_inline)) {
          const Vec<A> v = load(products[r] + c) + load(static_cast<const A*>(p.bias) + begin + c);
          store(static_cast<A*>(p.preactivation) + at + c, v);
          if (p.y) store(static_cast<A*>(p.y) + at + c, gelu<A>(v).value);
        });
      }
    });
  });
}

// grad_y · GELU'(preactivation) with the rows of an output side by side, and their sum.
template <class A>
void activation_backward(const FewRowsBackward& p) {
  const FewRowsShape& s = p.shape;
  for_each_part(s.out, kOutputs, s.threads, [&](int64_t begin, int64_t end) {
    A* grad = static_cast<A*>(p.grad_preactivation) + begin * s.rows;
    for (int64_t row = 0; row < s.rows; ++row) {
      A of_row[kOutputs];
      const A* upstream = static_cast<const A*>(p.grad_y) + row * p.grad_y_pitch + begin;
      const A* kept = p.preactivation ? static_cast<const A*>(p.preactivation) + row * s.out + begin : nullptr;
      for_each_vector<A>(end - begin, [&](int64_t c, auto load, auto store) __attribute__((always_inline)) {
        const Vec<A> v = load(upstream + c);
        store(of_row + c, kept ? v * gelu<A>(load(kept + c)).slope : v);
      });
      for (int64_t n = 0; n < end - begin; ++n) grad[n * s.rows + row] = of_row[n];
    }
    if (!p.grad_bias) return;
    for (int64_t n = 0; n < end - begin; ++n) {
      double sum = 0;
      for (int64_t row = 0; row < s.rows; ++row) sum += grad[n * s.rows + row];
      static_cast<A*>(p.grad_bias)[begin + n] = A(sum);
    }
  });
}

// The gradient of what the Linear took.
template <class A, class W>
void linear_backward(const FewRowsBackward& p, A* grad_input) {
  const FewRowsShape& s = p.shape;
  const A* grad = static_cast<const A*>(p.grad_preactivation);
  for_each_part(s.in, kInputs, s.threads, [&](int64_t begin, int64_t end) {
    const W* weight = static_cast<const W*>(p.weight) + begin;
    for (int64_t row = 0; row < s.rows; ++row)
      for (int64_t c = begin; c < end; ++c) grad_input[row * s.in + c] = 0;
    for (int64_t n0 = 0; n0 < s.out; n0 += kLines) {
      const int64_t n1 = least(n0 + kLines, s.out);
      // The processor doesn't guess the next lines of a strip.
      for (int64_t n = n1; n < n1 + kLines && n < s.out; ++n)
        for (int64_t c = 0; c < end - begin; c += 64 / int64_t(sizeof(W)))
          __builtin_prefetch(weight + n * p.weight_pitch + c);
      for_each_rows(0, s.rows, [&](auto count, int64_t row) __attribute__((always_inline)) {
        constexpr int kRows = decltype(count)::value;
        A* to = grad_input + row * s.in + begin;
        for_each_vector<A>(end - begin, [&](int64_t c, auto load, auto store) __attribute__((always_inline)) {
          Vec<A> sums[kRows] = {};  // a sum of such sums rounds less than one long sum
          for (int64_t n = n0; n < n1; ++n) {
            const Vec<A> w = load(weight + n * p.weight_pitch + c);
            for (int r = 0; r < kRows; ++r) sums[r] += grad[n * s.rows + row + r] * w;
          }
          for (int r = 0; r < kRows; ++r) store(to + r * s.in + c, load(to + r * s.in + c) + sums[r]);
        });
      });
    }
  });
}

template <class A>
void weight_backward(const FewRowsBackward& p) {
  const FewRowsShape& s = p.shape;
  const A* grad = static_cast<const A*>(p.grad_preactivation);
  const A* input = static_cast<const A*>(p.norm_weight ? p.normalized : p.x);
  for_each_part(s.out, kGradients, s.threads, [&](int64_t begin, int64_t end) {
    for_each_rows(begin, end, [&](auto count, int64_t n) __attribute__((always_inline)) {
      constexpr int kRows = decltype(count)::value;
      A* to = static_cast<A*>(p.grad_weight) + n * p.grad_weight_pitch;
      for_each_vector<A>(s.in, [&](int64_t c, auto load, auto store) __attribute__((always_inline)) {
        int64_t row = 0;
        do {  // once at least: the gradient of no rows is 0
          Vec<A> sums[kRows] = {};
          const bool add = p.accumulate || row > 0;
          for (const int64_t last = least(row + kTerms, s.rows); row < last; ++row) {
            const Vec<A> v = load(input + row * s.in + c);
            for (int j = 0; j < kRows; ++j) sums[j] += grad[(n + j) * s.rows + row] * v;
          }
          for (int j = 0; j < kRows; ++j) {
            A* at = to + j * p.grad_weight_pitch + c;
            store(at, add ? load(at) + sums[j] : sums[j]);
          }
        } while (row < s.rows);
      });
    });
  });
}

// As in token_features: dx = (g - mean(g) - y·mean(g·y)) / σ.
template <class A>
void norm_backward(const FewRowsBackward& p) {
  const int64_t dim = p.shape.in, rows = p.shape.rows;
  const A *x = static_cast<const A*>(p.x), *statistics = static_cast<const A*>(p.statistics);
  const A *norm_weight = static_cast<const A*>(p.norm_weight), *upstream = static_cast<const A*>(p.grad_normalized);
  parallel_for(rows, p.shape.threads, [&](int64_t row) {
    const A mean = statistics[2 * row], scale = statistics[2 * row + 1];
    Vec<A> of_g = {}, of_gy = {};
    const auto at = [&](int64_t c, const auto& load, Vec<A>& g) __attribute__((always_inline)) {
      g = load(upstream + row * dim + c) * load(norm_weight + c);
      return (load(x + row * dim + c) - mean) * scale;
    };
    for_each_vector<A>(dim, [&](int64_t c, auto load, auto) __attribute__((always_inline)) {
      Vec<A> g;
      const Vec<A> y = at(c, load, g);
      of_g += g;
      of_gy += g * y;
    });
    const A mean_g = sum_lanes<A>(of_g) / A(dim), mean_gy = sum_lanes<A>(of_gy) / A(dim);
    for_each_vector<A>(dim, [&](int64_t c, auto load, auto store) __attribute__((always_inline)) {
      Vec<A> g;
      const Vec<A> y = at(c, load, g);
      store(static_cast<A*>(p.grad_x) + row * dim + c, (g - mean_g - y * mean_gy) * scale);
    });
  });
  for_each_part(dim, kInputs, p.shape.threads, [&](int64_t begin, int64_t end) {
    for_each_vector<A>(end - begin, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
      const int64_t c = begin + i;
      LongSum<A> of_weight, of_bias;
      for (int64_t row = 0; row < rows;) {
        Vec<A> terms_of_weight = {}, terms_of_bias = {};
        for (const int64_t last = least(row + kTerms, rows); row < last; ++row) {
          const Vec<A> grad = load(upstream + row * dim + c);
          terms_of_weight += grad * ((load(x + row * dim + c) - statistics[2 * row]) * statistics[2 * row + 1]);
          terms_of_bias += grad;
        }
        of_weight.add(terms_of_weight);
        of_bias.add(terms_of_bias);
      }
      store(static_cast<A*>(p.grad_norm_weight) + c, of_weight.total());
      store(static_cast<A*>(p.grad_norm_bias) + c, of_bias.total());
    });
  });
}

template <class A, class W>
void backward(const FewRowsBackward& p) {
  activation_backward<A>(p);
  if (void* grad_input = p.norm_weight ? p.grad_normalized : p.grad_x)
    linear_backward<A, W>(p, static_cast<A*>(grad_input));
  if (p.norm_weight) normalize<A>(p);
  if (p.grad_weight) weight_backward<A>(p);
  if (p.norm_weight) norm_backward<A>(p);
}

// Calls f with the Types of what is computed in and of the weight.
template <class F>
void by_dtypes(const FewRowsShape& shape, const F& f) {
  by_dtype(shape.weight_dtype, [&](auto weight) { f(Type<wide_t<element_t<decltype(weight)>>>{}, weight); });
}

}  // namespace

void few_rows_forward(const FewRowsForward& p) {
  by_dtypes(p.shape, [&](auto a, auto w) { forward<element_t<decltype(a)>, element_t<decltype(w)>>(p); });
}

void few_rows_backward(const FewRowsBackward& p) {
  by_dtypes(p.shape, [&](auto a, auto w) { backward<element_t<decltype(a)>, element_t<decltype(w)>>(p); });
}

}  // namespace inti::INTI_ISA
