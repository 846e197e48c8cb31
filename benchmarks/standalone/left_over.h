// The sums that a backward entry point leaves where it is given partial sums and no outputs.
#pragma once

#include "inti/cuda/partial_sums.h"
#include "tensors.h"

namespace standalone {

class LeftOver {
 public:
  explicit LeftOver(DType wide) {
    all_.dtype = wide;
    all_.stream = stream();
  }

  // Sums of rows of `columns` contiguous numbers.
  void add(const Array& partials, int64_t columns, const Array& to) {
    add(partials, 0, columns, columns, columns, columns, to);
  }
  // Of rows `pitch` apart: their numbers from `first` on, in runs. They go to to's numbers from `at` on.
  void add(const Array& partials, int64_t first, int64_t pitch, int64_t columns, int64_t run, int64_t run_pitch,
           const Array& to, int64_t at = 0, bool negated = false) {
    all_.sums[all_.count++] = {number(partials, first),
                               partials.size() / pitch,
                               pitch,
                               columns,
                               run,
                               run_pitch,
                               number(to, at),
                               to.dtype(),
                               negated,
                               false};
  }
  // To [2, columns], the second row less itself.
  void add_both_signs(const Array& partials, int64_t columns, const Array& to) {
    add(partials, 0, columns, columns, columns, columns, to);
    add(partials, 0, columns, columns, columns, columns, to, columns, true);
  }
  void launch() const { inti::cuda::partial_sums(all_); }

 private:
  static void* number(const Array& array, int64_t i) {
    return static_cast<unsigned char*>(array.data()) + i * format_of(array.dtype()).bytes;
  }
  inti::cuda::PartialSums all_{};
};

}  // namespace standalone
