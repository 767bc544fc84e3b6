// float32, float64, bfloat16 and float16 in memory, the latter two as bits. Conversions have no
// branches, so that loops of them vectorise; all round to nearest even, and NaN stays NaN.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "tables.h"
#include "words.h"

namespace fused_sam {
inline namespace FUSED_SAM_ISA {

// Scalars, not structs: loops that copy structs do not vectorise.
enum class BFloat16 : uint16_t {};
enum class Float16 : uint16_t {};

template <typename S>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr Dtype kValue = Dtype::kFloat32;
};
template <>
struct DtypeOf<double> {
  static constexpr Dtype kValue = Dtype::kFloat64;
};
template <>
struct DtypeOf<BFloat16> {
  static constexpr Dtype kValue = Dtype::kBFloat16;
};
template <>
struct DtypeOf<Float16> {
  static constexpr Dtype kValue = Dtype::kFloat16;
};

FUSED_SAM_INLINE int size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

FUSED_SAM_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

FUSED_SAM_INLINE float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

FUSED_SAM_INLINE float load(float x) { return x; }
FUSED_SAM_INLINE double load(double x) { return x; }
FUSED_SAM_INLINE float load(BFloat16 x) { return from_bits(uint32_t(x) << 16); }

FUSED_SAM_INLINE float load(Float16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(uint16_t(x)));
#else
  const uint32_t sign = (uint32_t(x) & 0x8000u) << 16;
  const uint32_t magnitude = (uint32_t(x) & 0x7fffu) << 13;
  // The exponent moves by the difference of the biases; infinity and NaN move twice.
  const uint32_t shifted = magnitude + ((127u - 15u) << 23);
  const uint32_t special = magnitude >= (0x1fu << 23) ? (127u - 15u) << 23 : 0u;
  // A subnormal is an integer times 2**-24.
  const float subnormal = float(int32_t(uint32_t(x) & 0x7fffu)) * 0x1p-24f;
  const uint32_t bits = magnitude < (1u << 23) ? to_bits(subnormal) : shifted + special;
  return from_bits(bits | sign);
#endif
}

// round_to<S>(x): x as S.
template <typename S>
FUSED_SAM_INLINE S round_to(float x) {
  return x;
}

template <typename S>
FUSED_SAM_INLINE S round_to(double x) {
  return S(x);
}

template <>
FUSED_SAM_INLINE BFloat16 round_to<BFloat16>(float x) {
#if defined(__CUDA_ARCH__)
  return BFloat16(__bfloat16_as_ushort(__float2bfloat16_rn(x)));
#else
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  return BFloat16(uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded));
#endif
}

template <>
FUSED_SAM_INLINE Float16 round_to<Float16>(float x) {
#if defined(__CUDA_ARCH__)
  return Float16(__half_as_ushort(__float2half_rn(x)));
#else
  const uint32_t bits = to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal =
      (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 1/2 leaves the subnormal, rounded to a multiple of 2**-24, in the last bits.
  const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return Float16(uint16_t(half | sign));
#endif
}

template <>
FUSED_SAM_INLINE BFloat16 round_to<BFloat16>(double x) {
  return round_to<BFloat16>(float(x));  // as torch does
}

template <>
FUSED_SAM_INLINE Float16 round_to<Float16>(double x) {
  return round_to<Float16>(float(x));
}

// Rounding at random, to one of the two neighbours: fused_sam/backends/rounding.py, bit for bit.
FUSED_SAM_INLINE uint32_t hash(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

// 32 random bits of an element. at: its offset in the flat buffers. seed: the hash of the climb's
// number.
FUSED_SAM_INLINE uint32_t noise_of(int64_t at, uint32_t seed) { return hash(uint32_t(at) ^ seed); }

// float32 and float64 are stored as they are.
template <typename S, typename T>
FUSED_SAM_INLINE S round_stochastically(T x, uint32_t) {
  return x;
}

template <>
FUSED_SAM_INLINE BFloat16 round_stochastically<BFloat16, float>(float x, uint32_t noise) {
  const uint32_t bits = to_bits(x);
  const BFloat16 rounded = BFloat16(uint16_t((bits + (noise >> 16)) >> 16));
  return (bits & 0x7fffffffu) < 0x7f7f0000u ? rounded : round_to<BFloat16>(x);
}

template <>
FUSED_SAM_INLINE Float16 round_stochastically<Float16, float>(float x, uint32_t noise) {
  const uint32_t bits = to_bits(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - ((127u - 15u) << 23) + (noise >> 19)) >> 13;
  // Below it the neighbours are integers times 2**-24: in units of 2**-45. By masks, because what
  // chooses by the same condition twice is not vectorised.
  const uint32_t small = 0u - uint32_t(magnitude < (113u << 23));
  const uint32_t units = uint32_t(int32_t(from_bits(magnitude & small) * 0x1p45f));
  uint32_t half = ((units + (noise >> 11)) >> 21 & small) | (normal & ~small);
  // From 65504 on to nearest: 65520 and above are infinite.
  half = magnitude >= 0x477fe000u ? 0x7bffu : half;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return Float16(uint16_t(half | (bits >> 16 & 0x8000u)));
}

template <typename S>
struct Compute {
  using Type = float;
};

template <>
struct Compute<double> {
  using Type = double;
};

}  // namespace FUSED_SAM_ISA
}  // namespace fused_sam
