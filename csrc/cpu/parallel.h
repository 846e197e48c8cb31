// A loop over independent tasks on a given number of threads.
#pragma once

#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace inti::INTI_ISA {
namespace {

// Calls task(i) for i in [0, count). The number of threads is PyTorch's, never OpenMP's default. Tasks must not share
// what they write, and how the work is cut into tasks must not depend on threads: then neither do the results.
template <class Task>
void parallel_for(int64_t count, int threads, const Task& task) {
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (count > 1 && threads > 1)
#else
  (void)threads;
#endif
  for (int64_t i = 0; i < count; ++i) task(i);
}

// Of the thread that a task runs in: what it works in may depend on that, what it writes may not.
static inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace
}  // namespace inti::INTI_ISA
