// How elements travel between memory and registers, in packs: one 128-bit access, or one element.
//
// Buffers that all have one dtype are pointers to a storage type S. Where they have dtypes of their
// own, S is Mixed, and each buffer tells its dtype at run time: float32, bfloat16 or float16. Then
// a pack is four elements, and a half one travels in 64 bits. Which of the two it is has one
// predicate for all of a buffer, so that no branch stands between loads.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../storage.h"
#include "../tables.h"

// Tells the compiler what it cannot know of an address out of a table.
#if defined(__CUDA_ARCH__)
#define FUSED_SAM_ASSUME_GLOBAL(pointer) __builtin_assume(__isGlobal(pointer))
#else
#define FUSED_SAM_ASSUME_GLOBAL(pointer)
#endif

// A store that stays one. Of two that differ in width and stand in two branches the compiler would
// make one of 64 bits and two of 32.
#if defined(__CUDA_ARCH__)
#define FUSED_SAM_STORE(to, value) __stwb(to, value)
#else
#define FUSED_SAM_STORE(to, value) *(to) = (value)
#endif

namespace fused_sam {

constexpr int kAccess = 16;  // bytes: the widest load and store

struct Mixed {};

template <typename S>
using ComputeOf = typename Compute<S>::Type;

template <typename S>
constexpr int kPack = kAccess / sizeof(S);
template <>
inline constexpr int kPack<Mixed> = kAccess / sizeof(float);

// Memory whose dtype is known at run time; offsets count elements.
struct Memory {
  char* at;
  Dtype dtype;

  __device__ bool is_wide() const { return dtype == Dtype::kFloat32; }
  __device__ explicit operator bool() const { return at != nullptr; }
  __device__ Memory operator+(int64_t elements) const {
    return {at + (is_wide() ? 4 : 2) * elements, dtype};
  }
};

// Where elements of a buffer are.
template <typename S>
using Place = std::conditional_t<std::is_same_v<S, Mixed>, Memory, S*>;

template <typename S>
__device__ __forceinline__ Place<S> place(void* address, Dtype dtype) {
  if constexpr (std::is_same_v<S, Mixed>) {
    return {static_cast<char*>(address), dtype};
  } else {
    return static_cast<S*>(address);
  }
}

template <typename S>
__device__ __forceinline__ Place<S> place(int64_t address, Dtype dtype) {
  return place<S>(reinterpret_cast<void*>(address), dtype);
}

template <typename S>
__device__ __forceinline__ const void* address_of(S* place) {
  return place;
}

__device__ __forceinline__ const void* address_of(Memory place) { return place.at; }

template <typename S, int kWidth>
struct Pack {
  S at[kWidth];
};

// As words; halves are two in a word.
template <int kWidth>
struct Pack<Mixed, kWidth> {
  uint32_t words[kWidth];
};

// ------------------------------------------------------------------------------------ of one dtype

template <int kWidth, typename S>
__device__ __forceinline__ Pack<S, kWidth> read(S* from) {
  Pack<S, kWidth> pack;
  if constexpr (kWidth * sizeof(S) == kAccess) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    memcpy(&pack, &raw, kAccess);
  } else {
    static_assert(kWidth == 1, "an access is 128 bits or one element");
    pack.at[0] = *from;
  }
  return pack;
}

template <int kWidth, typename S>
__device__ __forceinline__ void write(S* to, const Pack<S, kWidth>& pack) {
  if constexpr (kWidth * sizeof(S) == kAccess) {
    uint4 raw;
    memcpy(&raw, &pack, kAccess);
    *reinterpret_cast<uint4*>(to) = raw;
  } else {
    *to = pack.at[0];
  }
}

template <typename S, int kWidth>
__device__ __forceinline__ ComputeOf<S> element(S*, const Pack<S, kWidth>& pack, int k) {
  return load(pack.at[k]);
}

// ------------------------------------------------------------------------------------------- mixed

template <int kWidth>
__device__ __forceinline__ Pack<Mixed, kWidth> read(Memory from) {
  Pack<Mixed, kWidth> pack = {};
  if constexpr (kWidth == 1) {
    pack.words[0] = from.is_wide() ? *reinterpret_cast<const uint32_t*>(from.at)
                                   : *reinterpret_cast<const uint16_t*>(from.at);
  } else if (from.is_wide()) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from.at);
    memcpy(&pack, &raw, sizeof(raw));
  } else {
    const uint2 raw = *reinterpret_cast<const uint2*>(from.at);
    memcpy(&pack, &raw, sizeof(raw));
  }
  return pack;
}

template <int kWidth>
__device__ __forceinline__ void write(Memory to, const Pack<Mixed, kWidth>& pack) {
  if constexpr (kWidth == 1) {
    if (to.is_wide()) {
      *reinterpret_cast<uint32_t*>(to.at) = pack.words[0];
    } else {
      *reinterpret_cast<uint16_t*>(to.at) = uint16_t(pack.words[0]);
    }
  } else if (to.is_wide()) {
    uint4 raw;
    memcpy(&raw, &pack, sizeof(raw));
    FUSED_SAM_STORE(reinterpret_cast<uint4*>(to.at), raw);
  } else {
    uint2 raw;
    memcpy(&raw, &pack, sizeof(raw));
    FUSED_SAM_STORE(reinterpret_cast<uint2*>(to.at), raw);
  }
}

// The k-th of a pack of halves.
template <int kWidth>
__device__ __forceinline__ uint16_t half_of(const Pack<Mixed, kWidth>& pack, int k) {
  return uint16_t(pack.words[k / 2] >> 16 * (k % 2));
}

template <int kWidth>
__device__ __forceinline__ float element(Memory from, const Pack<Mixed, kWidth>& pack, int k) {
  const uint16_t half = half_of(pack, k);
  return from.is_wide()                   ? from_bits(pack.words[k])
         : from.dtype == Dtype::kBFloat16 ? load(BFloat16(half))
                                          : load(Float16(half));
}

// A number as a half of this dtype.
__device__ __forceinline__ uint16_t narrow(Dtype dtype, float x) {
  return dtype == Dtype::kBFloat16 ? uint16_t(round_to<BFloat16>(x))
                                   : uint16_t(round_to<Float16>(x));
}

__device__ __forceinline__ uint16_t narrow_at_random(Dtype dtype, float x, uint32_t noise) {
  return dtype == Dtype::kBFloat16 ? uint16_t(round_stochastically<BFloat16>(x, noise))
                                   : uint16_t(round_stochastically<Float16>(x, noise));
}

// Numbers as a pack for that place. narrow(x, k): the k-th as a half.
template <int kWidth, typename F>
__device__ __forceinline__ Pack<Mixed, kWidth> packed(Memory to, const float (&x)[kWidth],
                                                      const F& narrow) {
  Pack<Mixed, kWidth> pack = {};
  if (to.is_wide()) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) pack.words[k] = to_bits(x[k]);
  } else {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      pack.words[k / 2] |= uint32_t(narrow(x[k], k)) << 16 * (k % 2);
    }
  }
  return pack;
}

template <int kWidth>
__device__ __forceinline__ Pack<Mixed, kWidth> packed(Memory to, const float (&x)[kWidth]) {
  return packed(to, x, [&](float number, int) { return narrow(to.dtype, number); });
}

// Whether a master, rounded, is the k-th weight of a pack, bit for bit; else the weight was changed
// from outside.
template <int kWidth>
__device__ __forceinline__ bool is_of(float master, Memory weights, const Pack<Mixed, kWidth>& pack,
                                      int k) {
  return narrow(weights.dtype, master) == half_of(pack, k);
}

}  // namespace fused_sam
