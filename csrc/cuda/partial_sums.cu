// partial_sums: the sums of several entry points in one launch. The kernel is partial_sums.h's.
#include "partial_sums.h"

namespace inti::cuda {

#ifndef __CUDACC_RTC__

void partial_sums(const PartialSums& p) { launch_partial_sums(p); }

#endif  // __CUDACC_RTC__

}  // namespace inti::cuda
