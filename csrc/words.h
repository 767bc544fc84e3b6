// The words of fused_sam/text.py in C++, for the mathematics that is generated from Python. They
// work on registers: no loads, no stores, no launches. T is the compute type: double for float64
// parameters, else float.
#pragma once

#if defined(__CUDACC__)
#define FUSED_SAM_INLINE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#include <cmath>
#define FUSED_SAM_INLINE __forceinline
#define FUSED_SAM_NOINLINE __declspec(noinline)
#else
#define FUSED_SAM_NOINLINE __attribute__((noinline))
#define FUSED_SAM_INLINE inline __attribute__((always_inline))
#endif

// The CPU kernels are compiled once for each instruction set; a namespace of its own for each keeps
// the linker from taking one's code for another's.
#ifndef FUSED_SAM_ISA
#define FUSED_SAM_ISA generic
#endif

#include <cstdint>

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

#if defined(__CUDACC__) || defined(_MSC_VER)
FUSED_SAM_INLINE float power(float x, float y) { return powf(x, y); }
FUSED_SAM_INLINE double power(double x, double y) { return ::pow(x, y); }
#else
FUSED_SAM_INLINE double power(double x, double y) { return __builtin_pow(x, y); }

// x >= 0; in double, and without branches, so that loops of it vectorise: powf would not.
FUSED_SAM_INLINE float power(float x, float y) {
  // x = m * 2**k, m in [sqrt(1/2), sqrt(2)), after subnormal numbers have been made normal.
  const bool subnormal = x < 0x1p-126f;
  const float normal = subnormal ? x * 0x1p24f : x;
  uint32_t bits;
  __builtin_memcpy(&bits, &normal, sizeof(bits));
  const uint32_t shifted = bits - 0x3f3504f3u;  // of sqrt(1/2)
  const int32_t k = (int32_t(shifted) >> 23) - (subnormal ? 24 : 0);
  bits = (shifted & 0x7fffffu) + 0x3f3504f3u;
  float m;
  __builtin_memcpy(&m, &bits, sizeof(m));
  // log2(m) = 2 / ln 2 * atanh(s), s = (m - 1) / (m + 1): |s| < 0.1716, so that the next term of
  // the series is below 2 * s**13 / 13 < 2e-11.
  const double s = (double(m) - 1) / (double(m) + 1), ss = s * s;
  double log2 = 1.0 / 11;
  log2 = log2 * ss + 1.0 / 9;
  log2 = log2 * ss + 1.0 / 7;
  log2 = log2 * ss + 1.0 / 5;
  log2 = log2 * ss + 1.0 / 3;
  log2 = log2 * ss + 1;
  log2 = double(k) + 2.8853900817779268 * s * log2;
  double exponent = double(y) * log2;
  exponent = exponent < -160 ? -160 : exponent > 130 ? 130 : exponent;
  // exp2(exponent) = 2**n * exp(z), |z| <= ln(2) / 2: the next term is below z**9 / 9! < 3e-10.
  const int32_t n = int32_t(exponent + (exponent < 0 ? -0.5 : 0.5));
  const double z = 0.69314718055994531 * (exponent - double(n));
  double exp = 1.0 / 40320;
  exp = exp * z + 1.0 / 5040;
  exp = exp * z + 1.0 / 720;
  exp = exp * z + 1.0 / 120;
  exp = exp * z + 1.0 / 24;
  exp = exp * z + 1.0 / 6;
  exp = exp * z + 1.0 / 2;
  exp = exp * z + 1;
  exp = exp * z + 1;
  // In two halves, each of which is a normal float.
  const int32_t half = n / 2;
  const uint32_t first = uint32_t(half + 127) << 23, second = uint32_t(n - half + 127) << 23;
  float low, high;
  __builtin_memcpy(&low, &first, sizeof(low));
  __builtin_memcpy(&high, &second, sizeof(high));
  const float value = float(exp) * low * high;
  return x > 0 ? value : x;  // 0 of 0, NaN of NaN
}
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

// The next term of a sum, or of a largest number.
template <bool kMax, typename T>
FUSED_SAM_INLINE T add(T all, T term) {
  if constexpr (kMax) {
    return maximum(all, term);
  } else {
    return all + term;
  }
}

}  // namespace words
}  // namespace FUSED_SAM_ISA
}  // namespace fused_sam
