// The CPU kernels for every machine; of x86 ones, for those since 2009 (x86-64-v2).
#define FUSED_SAM_ISA baseline

#if defined(__x86_64__) && defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v2"))), apply_to = function)
#include "kernels_impl.h"
#pragma clang attribute pop
#elif defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("arch=x86-64-v2")
#include "kernels_impl.h"
#else
#include "kernels_impl.h"
#endif
