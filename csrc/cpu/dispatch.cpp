// Chooses among the instruction sets that the CPU kernels were compiled for.
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

#include "kernels.h"

namespace fused_sam {

#define FUSED_SAM_DECLARE(isa)   \
  namespace isa {                \
  extern const Kernels kKernels; \
  }

FUSED_SAM_DECLARE(baseline)
#if defined(__x86_64__) && defined(__GNUC__)
FUSED_SAM_DECLARE(avx2)
FUSED_SAM_DECLARE(avx512)
#endif

#if defined(__x86_64__) && defined(__GNUC__)
// What a compiler may use for x86-64-v2, -v3 and -v4 (avx2.cpp, avx512.cpp, baseline.cpp). Where
// __builtin_cpu_supports does not know a name in every compiler, the bits of cpuid tell.
static bool has_v2() {
  unsigned a, b, c = 0, d, extended = 0;
  __get_cpuid(1, &a, &b, &c, &d);
  __get_cpuid(0x80000001u, &a, &b, &extended, &d);
  const bool has_cx16 = c >> 13 & 1u, has_lahf = extended & 1u;
  return __builtin_cpu_supports("sse3") && __builtin_cpu_supports("ssse3") &&
         __builtin_cpu_supports("sse4.1") && __builtin_cpu_supports("sse4.2") &&
         __builtin_cpu_supports("popcnt") && has_cx16 && has_lahf;
}

static bool has_v3() {
  unsigned a, b, c = 0, d, extended = 0;
  __get_cpuid(1, &a, &b, &c, &d);
  __get_cpuid(0x80000001u, &a, &b, &extended, &d);
  const bool has_movbe = c >> 22 & 1u, has_f16c = c >> 29 & 1u, has_lzcnt = extended >> 5 & 1u;
  return has_v2() && __builtin_cpu_supports("avx") && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && has_movbe && has_f16c && has_lzcnt;
}

static bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
#endif

static const Kernels& choose() {
#if defined(__x86_64__) && defined(__GNUC__)
  const char* wish = std::getenv("FUSED_SAM_CPU");
  const auto wanted = [wish](const Kernels& k) {
    return !wish || !*wish || !std::strcmp(wish, k.name);
  };
  __builtin_cpu_init();
  if (has_v4() && wanted(avx512::kKernels)) return avx512::kKernels;
  if (has_v3() && wanted(avx2::kKernels)) return avx2::kKernels;
#endif
  return baseline::kKernels;
}

bool run_here() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  return has_v2();
#else
  return true;
#endif
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace fused_sam
