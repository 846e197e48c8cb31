// Products rows[M, K] · weight[N, K]ᵀ whose rows are made while they are staged to shared memory and whose sums are
// finished in registers: on tensor cores (float16; bfloat16 from sm_80 on), or by FMA (float32, float64, bfloat16
// below). What the rows are and what becomes of the sums is a Problem's business.
#pragma once

#include "vectors.h"

namespace inti::cuda {

// A Problem is its kernel's parameters; it has
//   using Element = …;  static constexpr int kVector = …;  elements of the rows and of weight, and of a load
//   int rows, columns;                                M and N
//   const Element* weight;  int pitch;                [N, K] and the elements from row to row
//   static constexpr int kSources = …;                1 or 2: K may be in two parts
//   int extent(int source) const;                     a part's size; each is padded to whole steps along K
//   template <int COUNT> struct Rows;                 what a thread brings in of COUNT rows, 16 bytes of each a step:
//     Rows(const Problem&, const int (&row)[COUNT], int offset);
//     void fetch(const Problem&);                       to registers, as what takes long to come is wanted early
//     void fetch(const Problem&, int left);             the same at the end: 0 from `left` elements on
//     void advance(int elements);
//     void next_source(const Problem&, int offset);     to the start of the second part
//     Late late(const Problem&, bool whole, int left) const;  what is read only when it is needed; all of it is there
//                                                             if `whole`, else 0 takes its place from `left` on
//     template <class S> Vec<S, N> staged(const Problem&, const Late&, int i) const;  the elements of row i
//   template <int N> struct Columns;                  what finishing needs of N columns: Columns(const Problem&, int)
//   Wide finish(const Columns<N>&, int row, Vec<Wide, N> sums) const;
//   static constexpr bool kReduces = …;               whether finish()'s results are added up over 64 columns and go to
//   void store_row(int column_group, int row, Wide) const;

constexpr int kGroupColumns = 64;  // over which a row is reduced

template <class T>
constexpr bool is_float16 = false;
template <>
inline constexpr bool is_float16<float16> = true;

// The block's tile. Tiles of the same rows are neighbours, so that rows are read from DRAM once; and the last rows come
// first, because they are what the kernel before, which went through the rows in order, has left in the L2 cache.
template <class Problem>
__device__ __forceinline__ void locate_tile(const Problem& p, int tile_rows, int tile_columns, int& row, int& column) {
  const unsigned across = (p.columns + tile_columns - 1) / tile_columns, down = (p.rows + tile_rows - 1) / tile_rows;
  const unsigned from_last = blockIdx.x / across;
  row = (down - 1 - from_last) * tile_rows;
  column = (blockIdx.x - from_last * across) * tile_columns;
}

template <class Problem>
__device__ __forceinline__ int steps_of(const Problem& p, int depth) {
  int steps = (p.extent(0) + depth - 1) / depth;
  if constexpr (Problem::kSources == 2) steps += (p.extent(1) + depth - 1) / depth;
  return steps;
}

// What a thread brings in: the 16 bytes at `offset` of every step, of A rows and B columns.
// Rows and columns past the edge repeat the last one: their sums are dropped, and no load needs a test of its own.
template <class Problem, int A, int B>
struct Operands {
  using T = typename Problem::Element;
  using Rows = typename Problem::template Rows<A>;
  Rows rows;
  int weight[B];         // where the step's elements of each column are
  Packed<T> weights[B];  // of each column
  int left, steps;       // elements of this source, and steps of it, from this one on

  __device__ __forceinline__ static int min_of(int a, int b) { return a < b ? a : b; }
  __device__ __forceinline__ static Rows first_rows(const Problem& p, int row, int row_step, int offset) {
    int row_of[A];
#pragma unroll
    for (int i = 0; i < A; ++i) row_of[i] = min_of(row + i * row_step, p.rows - 1);
    return Rows(p, row_of, offset);
  }

  __device__ __forceinline__ Operands(const Problem& p, int row, int column, int row_step, int offset, int depth)
      : rows(first_rows(p, row, row_step, offset)) {
#pragma unroll
    for (int i = 0; i < B; ++i) weight[i] = min_of(column + i * row_step, p.columns - 1) * p.pitch + offset;
    left = p.extent(0);
    steps = (left + depth - 1) / depth;
  }

  // A step that is whole, as all but a part's last are, is told apart by a branch: zeros to begin with would cost an
  // instruction a register.
  __device__ __forceinline__ void fetch(const Problem& p, int offset, int depth) {
    if (left >= depth) {
      rows.fetch(p);
#pragma unroll
      for (int i = 0; i < B; ++i) weights[i] = load_packed<Problem::kVector>(p.weight + weight[i]);
    } else {
      rows.fetch(p, left - offset);
#pragma unroll
      for (int i = 0; i < B; ++i) weights[i] = load_packed<Problem::kVector>(p.weight + weight[i], left - offset);
    }
  }

  __device__ __forceinline__ auto late(const Problem& p, int offset, int depth) const {
    return rows.late(p, left >= depth, left - offset);
  }

  __device__ __forceinline__ void advance(const Problem& p, int offset, int depth) {
    int by = depth;
    rows.advance(depth);
    if constexpr (Problem::kSources == 2) {
      if (--steps == 0) {
        by = left;
        left = p.extent(1) + depth;
        rows.next_source(p, offset);
      }
    }
    left -= depth;
#pragma unroll
    for (int i = 0; i < B; ++i) weight[i] += by;
  }
};

// --- Tensor cores ----------------------------------------------------------------------------------------------------

// A block's tile is 64 rows × 128 columns, 32 deep; four warps, 2 × 2, each with 32 × 64 as 2 × 4 fragments. Staged
// rows are 80 bytes apart: fragments stay 32-byte aligned, and rows of eight lanes start in different banks.
struct WmmaTile {
  static constexpr int kRows = 64, kColumns = 128, kDepth = 32, kThreads = 128;
  template <int V>
  static constexpr int kBlocks = V > 1 ? 3 : 2;  // an SM's; single elements' predicates take registers
  static constexpr int kPitch = kDepth + 8;
  static constexpr int kBuffer = (kRows + kColumns) * kPitch;  // elements: rows, then the weight's
  static constexpr int kSharedBytes = 2 * kBuffer * 2;
  static constexpr int kSumPitch = 68;  // floats; a warp passes 16 × 64 sums at a time
};
static_assert(4 * 16 * WmmaTile::kSumPitch * 4 <= WmmaTile::kSharedBytes, "the sums reuse the operands' memory");

template <class Problem>
__device__ __forceinline__ void wmma_finish(const Problem& p, FragmentSum (&sums)[2][4], int row, int column) {
  using Tile = WmmaTile;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Shared<float> passed = dynamic_shared<float>(0) + warp * (16 * Tile::kSumPitch);
  const int column_in_warp = lane % 8 * 8;
  row += warp / 2 * 32;
  column += warp % 2 * 64;
  const typename Problem::template Columns<8> columns(p, column + column_in_warp);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) store_fragment(passed + 16 * j, sums[i][j], Tile::kSumPitch);
    __syncwarp();
#pragma unroll 1
    for (int r = lane / 8; r < 16; r += 4) {
      const int at = row + 16 * i + r;
      if constexpr (!Problem::kReduces) {
        if (at >= p.rows) break;
      }
      Vec<float, 8> run;
#pragma unroll
      for (int k = 0; k < 8; k += 4) {
        const auto part = load<4>(passed + (r * Tile::kSumPitch + column_in_warp + k));
#pragma unroll
        for (int n = 0; n < 4; ++n) run[k + n] = part[n];
      }
      if constexpr (Problem::kReduces) {
        float total = at < p.rows ? p.finish(columns, at, run) : 0.0f;
#pragma unroll
        for (int distance = 4; distance > 0; distance /= 2) total += __shfl_xor_sync(0xffffffffu, total, distance);
        if (lane % 8 == 0 && at < p.rows && column < p.columns) p.store_row(column / kGroupColumns, at, total);
      } else {
        p.finish(columns, at, run);
      }
    }
    __syncwarp();
  }
}

template <class Problem>
__device__ __forceinline__ void wmma_gemm(const Problem& p) {
  using Tile = WmmaTile;
  using T = typename Problem::Element;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int first_row, first_column;
  locate_tile(p, Tile::kRows, Tile::kColumns, first_row, first_column);

  // Four lanes read 64 bytes of a row. Eight lanes have rows r and r + 4: at a pitch of 80 bytes just these two share
  // no bank when they are staged.
  const int offset = lane % 4 * 8, row = lane / 8 + lane / 4 % 2 * 4 + warp * 8;
  Operands<Problem, 2, 4> operands(p, first_row + row, first_column + row, 32, offset, Tile::kDepth);
  const Shared<T> shared = dynamic_shared<T>(0);
  const auto stage = [&](int buffer) {
    const auto late = operands.late(p, offset, Tile::kDepth);
    const Shared<unsigned> to =
        dynamic_shared<unsigned>(0) + (buffer * Tile::kBuffer + row * Tile::kPitch + offset) / 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) store(to + (Tile::kRows + 32 * i) * Tile::kPitch / 2, operands.weights[i].words);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      store(to + 32 * i * Tile::kPitch / 2, packed<T>(operands.rows.template staged<T>(p, late, i)).words);
  };

  FragmentSum sums[2][4];
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) wmma::fill_fragment(sums[i][j], 0.0f);

  const int steps = steps_of(p, Tile::kDepth);
  operands.fetch(p, offset, Tile::kDepth);
  stage(0);
  __syncthreads();
  // The next step's loads are under way during this one's products, and go to the other buffer: one barrier a step.
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const bool more = step + 1 < steps;
    if (more) {
      operands.advance(p, offset, Tile::kDepth);
      operands.fetch(p, offset, Tile::kDepth);
    }
    const Shared<T> rows = shared + (step % 2 * Tile::kBuffer + warp / 2 * 32 * Tile::kPitch);
    const Shared<T> weights = shared + (step % 2 * Tile::kBuffer + (Tile::kRows + warp % 2 * 64) * Tile::kPitch);
#pragma unroll
    for (int k = 0; k < Tile::kDepth; k += 16) {
      FragmentA<T> a[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) load_fragment(a[i], rows + (16 * i * Tile::kPitch + k), Tile::kPitch);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        FragmentB<T> b;
        load_fragment(b, weights + (16 * j * Tile::kPitch + k), Tile::kPitch);
#pragma unroll
        for (int i = 0; i < 2; ++i) wmma::mma_sync(sums[i][j], a[i], b, sums[i][j]);
      }
    }
    if (more) stage((step + 1) % 2);
    __syncthreads();
  }
  wmma_finish(p, sums, first_row, first_column);
}

// --- FMA -------------------------------------------------------------------------------------------------------------

// A block's tile is 64 × 64, as deep as four 16-byte loads; 256 threads with 4 × 4 sums each. Operands are staged wide
// and with the rows inside, [depth, 64], so that a thread reads its four of a step at once; the rows of the four loads'
// elements are rotated against each other (an exclusive or), which puts a warp's stores into different banks.
template <class T>
struct FmaTile {
  static constexpr int kRows = 64, kColumns = 64, kRun = 16 / sizeof(T), kDepth = 4 * kRun;
  static constexpr int kThreads = 256, kBlocks = 2;
  static constexpr int kBuffer = 2 * kDepth * 64;  // wide elements: rows, then the weight's
  static constexpr int kSharedBytes = 2 * kBuffer * static_cast<int>(sizeof(Wide<T>));
  static constexpr int kRotation = 32 / sizeof(Wide<T>);
};

template <class W>
__device__ __forceinline__ Vec<W, 4> load_four(Shared<W> from) {
  constexpr int step = kWideStep<W, 4>;
  Vec<W, 4> four;
#pragma unroll
  for (int i = 0; i < 4; i += step) {
    const auto part = load<step>(from + i);
#pragma unroll
    for (int k = 0; k < step; ++k) four[i + k] = part[k];
  }
  return four;
}

template <class Problem, class W>
__device__ __forceinline__ void fma_finish(const Problem& p, const Vec<W, 4> (&sums)[4], int row, int column) {
  const int in_row = threadIdx.x % 16 * 4;
  const typename Problem::template Columns<4> columns(p, column + in_row);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = row + threadIdx.x / 16 * 4 + i;
    if constexpr (Problem::kReduces) {
      W total = at < p.rows ? p.finish(columns, at, sums[i]) : W(0);
#pragma unroll
      for (int distance = 8; distance > 0; distance /= 2) total += __shfl_xor_sync(0xffffffffu, total, distance);
      if (in_row == 0 && at < p.rows) p.store_row(column / kGroupColumns, at, total);
    } else {
      if (at < p.rows) p.finish(columns, at, sums[i]);
    }
  }
}

template <class Problem>
__device__ __forceinline__ void fma_gemm(const Problem& p) {
  using T = typename Problem::Element;
  using W = Wide<T>;
  using Tile = FmaTile<T>;
  int first_row, first_column;
  locate_tile(p, Tile::kRows, Tile::kColumns, first_row, first_column);

  const int run = threadIdx.x % 4, row = threadIdx.x / 4, offset = run * Tile::kRun;
  Operands<Problem, 1, 1> operands(p, first_row + row, first_column + row, 0, offset, Tile::kDepth);
  const Shared<W> shared = dynamic_shared<W>(0);
  const auto stage = [&](int buffer) {
    const Shared<W> to = shared + (buffer * Tile::kBuffer + offset * 64 + (row ^ run * Tile::kRotation));
    const auto a = operands.rows.template staged<W>(p, operands.late(p, offset, Tile::kDepth), 0);
    const auto b = converted<W>(operands.weights[0].unpacked());
#pragma unroll
    for (int k = 0; k < Tile::kRun; ++k) {
      store(to + k * 64, a[k]);
      store(to + (Tile::kDepth + k) * 64, b[k]);
    }
  };

  Vec<W, 4> sums[4]{};  // [rows][columns]
  const int a_row = threadIdx.x / 16 * 4, b_row = threadIdx.x % 16 * 4;
  const int steps = steps_of(p, Tile::kDepth);
  operands.fetch(p, offset, Tile::kDepth);
  stage(0);
  __syncthreads();
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const bool more = step + 1 < steps;
    if (more) {
      operands.advance(p, offset, Tile::kDepth);
      operands.fetch(p, offset, Tile::kDepth);
    }
    const Shared<W> rows = shared + step % 2 * Tile::kBuffer, weights = rows + Tile::kDepth * 64;
#pragma unroll
    for (int k = 0; k < Tile::kDepth; ++k) {
      const int rotation = k / Tile::kRun * Tile::kRotation;
      const auto a = load_four<W>(rows + (k * 64 + (a_row ^ rotation)));
      const auto b = load_four<W>(weights + (k * 64 + (b_row ^ rotation)));
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += a[i] * b[j];
    }
    if (more) stage((step + 1) % 2);
    __syncthreads();
  }
  fma_finish(p, sums, first_row, first_column);
}

// --- Host ------------------------------------------------------------------------------------------------------------
#ifndef __CUDACC_RTC__

// Whether products of T go to the tensor cores: by the code that runs, which may be older than the GPU.
template <class T>
bool uses_tensor_cores() {
  return std::is_same_v<T, float16> || (std::is_same_v<T, bfloat16> && compiled_for() >= 80);
}

template <class Tile, class Problem>
void launch_gemm(void (*kernel)(Problem), const char* name, const Problem& p, void* stream) {
  const int64_t down = (int64_t{p.rows} + Tile::kRows - 1) / Tile::kRows;
  const int64_t across = (int64_t{p.columns} + Tile::kColumns - 1) / Tile::kColumns;
  launch(kernel, Launch{name, down * across, Tile::kThreads, Tile::kSharedBytes, stream, Tile::kThreads}, p);
}

#endif  // __CUDACC_RTC__

}  // namespace inti::cuda
