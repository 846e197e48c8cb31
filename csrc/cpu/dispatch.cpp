// Chooses the instruction set. Compiled for the baseline, as whatever runs before the choice must be.
#include <cstdlib>
#include <stdexcept>

#include "inti/build_info.h"
#include "inti/cpu.h"
#if INTI_HAVE_AVX2 || INTI_HAVE_AVX512
#include <cpuid.h>
#endif

#define INTI_ISA baseline
#include "kernels.inc"
#undef INTI_ISA
#if INTI_HAVE_AVX2
#define INTI_ISA avx2
#include "kernels.inc"
#undef INTI_ISA
#endif
#if INTI_HAVE_AVX512
#define INTI_ISA avx512
#include "kernels.inc"
#undef INTI_ISA
#endif

namespace inti {
namespace {

struct Isa {
  const char* name;
  const CpuKernels* kernels;
};

#if INTI_HAVE_AVX2 || INTI_HAVE_AVX512
// By hand, since clang's __builtin_cpu_supports doesn't know F16C, and a hypervisor can mask it.
bool has_fma_and_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) && __builtin_cpu_supports("fma");
}
#endif

std::vector<Isa> supported() {
  std::vector<Isa> isas{{"baseline", &baseline::kernels}};
#if INTI_HAVE_AVX2
  if (has_fma_and_f16c() && __builtin_cpu_supports("avx2")) isas.push_back({"avx2", &avx2::kernels});
#endif
#if INTI_HAVE_AVX512
  if (has_fma_and_f16c() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    isas.push_back({"avx512", &avx512::kernels});
#endif
  return isas;
}

Isa find(const std::string& name) {
  std::string names;
  for (const Isa& isa : supported()) {
    if (name == isa.name) return isa;
    names += names.empty() ? isa.name : std::string(", ") + isa.name;
  }
  throw std::invalid_argument("INTI_CPU must name an instruction set that was built and that this processor has (" +
                              names + "), got '" + name + "'");
}

Isa& current() {
  static Isa isa = [] {
    const char* forced = std::getenv("INTI_CPU");
    return forced && *forced ? find(forced) : supported().back();
  }();
  return isa;
}

}  // namespace

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : supported()) names.push_back(isa.name);
  return names;
}

std::string cpu_isa() { return current().name; }

void set_cpu_isa(const std::string& name) { current() = find(name); }

const CpuKernels& cpu_kernels() { return *current().kernels; }

}  // namespace inti
