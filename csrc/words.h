// The words of fused_sam/text.py in C++, for the mathematics that is generated from Python. They
// work on registers: no loads, no stores, no launches. T is the compute type: double for float64
// parameters, else float.
#pragma once

#if defined(__CUDACC__)
#define FUSED_SAM_INLINE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#include <cmath>
#define FUSED_SAM_INLINE __forceinline
#else
#define FUSED_SAM_INLINE inline __attribute__((always_inline))
#endif

// The CPU kernels are compiled once for each instruction set; a namespace of its own for each keeps
// the linker from taking one's code for another's.
#ifndef FUSED_SAM_ISA
#define FUSED_SAM_ISA generic
#endif

namespace fused_sam {
inline namespace FUSED_SAM_ISA {

namespace words {

#if defined(__CUDACC__) || defined(_MSC_VER)
FUSED_SAM_INLINE float sqrt(float x) { return sqrtf(x); }
FUSED_SAM_INLINE double sqrt(double x) { return ::sqrt(x); }
FUSED_SAM_INLINE float expm1(float x) { return expm1f(x); }
FUSED_SAM_INLINE double expm1(double x) { return ::expm1(x); }
#else
FUSED_SAM_INLINE float sqrt(float x) { return __builtin_sqrtf(x); }
FUSED_SAM_INLINE double sqrt(double x) { return __builtin_sqrt(x); }
FUSED_SAM_INLINE float expm1(float x) { return __builtin_expm1f(x); }
FUSED_SAM_INLINE double expm1(double x) { return __builtin_expm1(x); }
#endif

template <typename T>
FUSED_SAM_INLINE T where(bool condition, T x, T y) {
  return condition ? x : y;
}

template <typename T>
FUSED_SAM_INLINE T divide(T x, T y) {
  return x / y;
}

template <typename T>
FUSED_SAM_INLINE T abs(T x) {
  return x < T(0) ? -x : x;
}

// 0 for NaN.
template <typename T>
FUSED_SAM_INLINE T sign(T x) {
  return x > T(0) ? T(1) : x < T(0) ? T(-1) : T(0);
}

// NaN if either is NaN, as torch.maximum.
template <typename T>
FUSED_SAM_INLINE T maximum(T x, T y) {
  return x > y || x != x ? x : y;
}

}  // namespace words
}  // namespace FUSED_SAM_ISA
}  // namespace fused_sam
