// The CPU kernels for AVX-512.
#define FUSED_SAM_ISA avx512

#if defined(__x86_64__) && defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4"))), apply_to = function)
#include "kernels_impl.h"
#pragma clang attribute pop
#elif defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("arch=x86-64-v4")
#include "kernels_impl.h"
#endif
