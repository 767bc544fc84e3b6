// The CPU kernels for AVX2.
#define FUSED_SAM_ISA avx2

#if defined(__x86_64__) && defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v3"))), apply_to = function)
#include "kernels_impl.h"
#pragma clang attribute pop
#elif defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("arch=x86-64-v3")
#include "kernels_impl.h"
#endif
