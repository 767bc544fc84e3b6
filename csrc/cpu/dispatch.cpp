// Chooses among the instruction sets that the CPU kernels were compiled for.
#include <cstdlib>
#include <cstring>

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

static const Kernels& choose() {
#if defined(__x86_64__) && defined(__GNUC__)
  const char* wish = std::getenv("FUSED_SAM_CPU");
  const auto wanted = [wish](const Kernels& k) {
    return !wish || !*wish || !std::strcmp(wish, k.name);
  };
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512cd") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && wanted(avx512::kKernels)) return avx512::kKernels;
  if (has_avx2 && wanted(avx2::kKernels)) return avx2::kKernels;
#endif
  return baseline::kKernels;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace fused_sam
