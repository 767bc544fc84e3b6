// The CUDA kernels. They use blocks of kThreads threads, __syncthreads, warp shuffles, static
// shared memory and one integer atomic, and nothing of the host: the tests run this very file on a
// CPU, under an emulation of those.
//
// A chunk is kChunk elements of one parameter; the table of chunks is walked by a persistent grid.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../rules.h"
#include "../storage.h"
#include "../tables.h"
#include "launch.h"

// Tells the compiler what it cannot know of an address out of a table.
#if defined(__CUDA_ARCH__)
#define FUSED_SAM_ASSUME_GLOBAL(pointer) __builtin_assume(__isGlobal(pointer))
#else
#define FUSED_SAM_ASSUME_GLOBAL(pointer)
#endif

namespace fused_sam {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kMinBlocks = 2;  // for each multiprocessor: up to 128 registers a thread, no spills
constexpr int kAccess = 16;    // bytes: the widest load and store

template <typename S>
using ComputeOf = typename Compute<S>::Type;

// kWidth elements that travel together: one 128-bit access, or one element.
template <typename S, int kWidth>
struct Pack {
  S at[kWidth];
};

template <int kWidth, typename S>
__device__ __forceinline__ Pack<S, kWidth> read(const S* from) {
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

__device__ __forceinline__ bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kAccess == 0;
}

// The part of a parameter that a block works on.
template <typename S>
struct Piece {
  Slot slot;
  int64_t index;  // of the slot
  int64_t at;     // of the first element in the flat buffers
  int numel;
  S* weights;
  const S* grad;  // or null
};

template <typename S>
__device__ __forceinline__ Piece<S> piece_of(const DeviceProblem& p, int chunk) {
  const Chunk c = p.chunks[chunk];
  Piece<S> piece;
  piece.slot = p.slots[c.slot];
  piece.index = c.slot;
  piece.at = piece.slot.start + c.offset;
  const int64_t rest = piece.slot.numel - c.offset;
  piece.numel = static_cast<int>(rest < kChunk ? rest : kChunk);
  piece.weights = (piece.slot.pinned ? reinterpret_cast<S*>(piece.slot.pinned)
                                     : static_cast<S*>(p.weights) + piece.slot.start) +
                  c.offset;
  const S* grad = reinterpret_cast<const S*>(p.grads[c.slot]);
  piece.grad = grad ? grad + c.offset : nullptr;
  FUSED_SAM_ASSUME_GLOBAL(piece.weights);
  FUSED_SAM_ASSUME_GLOBAL(piece.grad);
  return piece;
}

// Calls body(width, unroll, i) for this thread's elements: 128-bit accesses where they are
// possible, kUnroll of them in flight (at i and every kThreads * width after it), and the rest one
// by one.
template <typename S, int kUnroll, typename F>
__device__ __forceinline__ void for_packs(int numel, bool aligned, const F& body) {
  constexpr int kWide = kAccess / sizeof(S);
  constexpr int kStride = kThreads * kWide;
  const std::integral_constant<int, kWide> wide;
  const std::integral_constant<int, 1> one;
  const int end = aligned ? numel / kWide * kWide : 0;
  int i = int(threadIdx.x) * kWide;
  if constexpr (kUnroll > 1) {
#pragma unroll 1
    for (; i + kStride * (kUnroll - 1) < end; i += kStride * kUnroll) {
      body(wide, std::integral_constant<int, kUnroll>(), i);
    }
  }
#pragma unroll 1
  for (; i < end; i += kStride) body(wide, one, i);
#pragma unroll 1
  for (i = end + int(threadIdx.x); i < numel; i += kThreads) body(one, one, i);
}

// --------------------------------------------------------------------------------------- reduction

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, distance);
  }
  return x;
}

// The sum over the block, in every thread, always added in the same order.
__device__ __forceinline__ double block_sum(double x) {
  __shared__ double warps[kThreads / kWarp];
  x = warp_sum(x);
  __syncthreads();  // whoever still reads the last sum
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  double sum = 0;
#pragma unroll
  for (int warp = 0; warp < kThreads / kWarp; ++warp) sum += warps[warp];
  return sum;
}

// ----------------------------------------------------------------------------------------- sq_norm

template <typename S, bool kAdaptive>
__device__ __forceinline__ ComputeOf<S> sum_squares(const Piece<S>& piece, bool aligned,
                                                    ComputeOf<S> eta) {
  using T = ComputeOf<S>;
  T sum = T(0);
  for_packs<S, 4>(piece.numel, aligned, [&](auto width, auto unroll, int i) {
    constexpr int kWidth = decltype(width)::value, kUnroll = decltype(unroll)::value;
    constexpr int kStride = kThreads * kWidth;
    Pack<S, kWidth> weights[kUnroll], grad[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (kAdaptive) weights[u] = read<kWidth>(piece.weights + i + u * kStride);
      grad[u] = read<kWidth>(piece.grad + i + u * kStride);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const T w = kAdaptive ? load(weights[u].at[k]) : T(0);
        const T x = ascent_dual(w, load(grad[u].at[k]), kAdaptive, eta);
        sum += x * x;
      }
    }
  });
  return sum;
}

// This block's share of the squared norm, in every thread.
template <typename S>
__device__ double share_of_sq_norm(const DeviceProblem& p, bool by_group) {
  using T = ComputeOf<S>;
  const Hyper<T>* hyper = static_cast<const Hyper<T>*>(p.hyper);
  double sum = 0;
  for (int chunk = blockIdx.x; chunk < p.num_chunks; chunk += gridDim.x) {
    const Piece<S> piece = piece_of<S>(p, chunk);
    if (!piece.grad) continue;
    const Hyper<T>& group = hyper[piece.slot.row];
    if (by_group && group.adaptive != T(0)) {
      const bool aligned = is_aligned(piece.grad) && is_aligned(piece.weights);
      sum += sum_squares<S, true>(piece, aligned, group.eta);
    } else {
      sum += sum_squares<S, false>(piece, is_aligned(piece.grad), T(0));
    }
  }
  return block_sum(sum);
}

// partials: T (kPartials,); those beyond the grid become 0.
template <typename T>
__device__ void write_partial(T* partials, double sum) {
  if (threadIdx.x == 0) partials[blockIdx.x] = T(sum);
  if (blockIdx.x != 0) return;
  for (int i = gridDim.x + threadIdx.x; i < kPartials; i += kThreads) partials[i] = T(0);
}

template <typename S>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    sq_norm_kernel(DeviceProblem p, ComputeOf<S>* partials, bool by_group) {
  write_partial(partials, share_of_sq_norm<S>(p, by_group));
}

// ---------------------------------------------------------------------------------------- perturb_

template <typename T>
__device__ T sum_of(const T* values, int64_t n) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += double(values[i]);
  return T(block_sum(sum));
}

template <typename S, bool kAdaptive>
__device__ __forceinline__ void climb(S* saved, const Piece<S>& piece, bool aligned,
                                      ComputeOf<S> scale, ComputeOf<S> eta) {
  using T = ComputeOf<S>;
  for_packs<S, 2>(piece.numel, aligned, [&](auto width, auto unroll, int i) {
    constexpr int kWidth = decltype(width)::value, kUnroll = decltype(unroll)::value;
    constexpr int kStride = kThreads * kWidth;
    Pack<S, kWidth> weights[kUnroll], grad[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      weights[u] = read<kWidth>(piece.weights + i + u * kStride);
      grad[u] = read<kWidth>(piece.grad + i + u * kStride);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      write(saved + i + u * kStride, weights[u]);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const T w = load(weights[u].at[k]);
        weights[u].at[k] = round_to<S>(ascend(w, load(grad[u].at[k]), scale, kAdaptive, eta));
      }
      write(piece.weights + i + u * kStride, weights[u]);
    }
  });
}

// Copies a piece of a parameter.
template <typename S>
__device__ __forceinline__ void copy(S* to, const S* from, int numel, bool aligned) {
  for_packs<S, 2>(numel, aligned, [&](auto width, auto unroll, int i) {
    constexpr int kWidth = decltype(width)::value, kUnroll = decltype(unroll)::value;
    constexpr int kStride = kThreads * kWidth;
    Pack<S, kWidth> packs[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) packs[u] = read<kWidth>(from + i + u * kStride);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) write(to + i + u * kStride, packs[u]);
  });
}

template <typename S>
__device__ __forceinline__ void perturb_chunk(const DeviceProblem& p, ComputeOf<S> sq_norm,
                                              int chunk) {
  using T = ComputeOf<S>;
  const Piece<S> piece = piece_of<S>(p, chunk);
  if (!piece.grad) return;
  const Hyper<T>& group = static_cast<const Hyper<T>*>(p.hyper)[piece.slot.row];
  const T scale = ascent_scale(group.rho, sq_norm);
  S* saved = static_cast<S*>(p.saved) + piece.at;
  const bool aligned = is_aligned(piece.grad) && is_aligned(piece.weights);
  if (scale == T(0)) {
    copy<S>(saved, piece.weights, piece.numel, is_aligned(piece.weights));
  } else if (group.adaptive != T(0)) {
    climb<S, true>(saved, piece, aligned, scale, group.eta);
  } else {
    climb<S, false>(saved, piece, aligned, scale, group.eta);
  }
}

template <typename S>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    perturb_kernel(DeviceProblem p, const ComputeOf<S>* sq_norm, int64_t num_partials) {
  const ComputeOf<S> sum = sum_of(sq_norm, num_partials);
  for (int chunk = blockIdx.x; chunk < p.num_chunks; chunk += gridDim.x) {
    perturb_chunk<S>(p, sum, chunk);
  }
}

// ----------------------------------------------------------------------------------------- update_

// weights and from may be the same memory.
template <typename Rule, int kOptions, typename S>
__device__ __forceinline__ void update_piece(const DeviceProblem& p, const Piece<S>& piece,
                                             const S* from, const Hyper<ComputeOf<S>>& group_,
                                             const Step<ComputeOf<S>>& step) {
  using T = ComputeOf<S>;
  const Hyper<T> group = group_;
  const bool frozen = group.lr == T(0);
  const bool aligned = is_aligned(piece.grad) && is_aligned(piece.weights);
  S* states[kMaxStates];
#pragma unroll
  for (int k = 0; k < kMaxStates; ++k) {
    states[k] = Rule::uses(kOptions, k) ? static_cast<S*>(p.states[k]) + piece.at : nullptr;
  }
  // Two accesses in flight for each buffer where the registers suffice.
  constexpr int kMaxUnroll = sizeof(S) == 4 && !Rule::uses(kOptions, 2) ? 2 : 1;
  for_packs<S, kMaxUnroll>(piece.numel, aligned, [&](auto width, auto unroll, int i) {
    constexpr int kWidth = decltype(width)::value, kUnroll = decltype(unroll)::value;
    constexpr int kStride = kThreads * kWidth;
    Pack<S, kWidth> weights[kUnroll], grad[kUnroll], state[kMaxStates][kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      weights[u] = read<kWidth>(from + i + u * kStride);
      grad[u] = read<kWidth>(piece.grad + i + u * kStride);
#pragma unroll
      for (int s = 0; s < kMaxStates; ++s) {
        if (!Rule::uses(kOptions, s)) continue;
        state[s][u] = read<kWidth>(static_cast<const S*>(states[s] + i + u * kStride));
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        T buffers[kMaxStates] = {};
#pragma unroll
        for (int s = 0; s < kMaxStates; ++s) {
          if (Rule::uses(kOptions, s)) buffers[s] = load(state[s][u].at[k]);
        }
        const S old = weights[u].at[k];
        const S updated = round_to<S>(
            Rule::template update<kOptions>(load(old), load(grad[u].at[k]), buffers, group, step));
#pragma unroll
        for (int s = 0; s < kMaxStates; ++s) {
          if (Rule::uses(kOptions, s)) state[s][u].at[k] = round_to<S>(buffers[s]);
        }
        // 0 * inf is NaN and -0.0 - -0.0 is 0.0: with lr 0 only a copy gives the bits back.
        weights[u].at[k] = frozen ? old : updated;
      }
      write(piece.weights + i + u * kStride, weights[u]);
#pragma unroll
      for (int s = 0; s < kMaxStates; ++s) {
        if (Rule::uses(kOptions, s)) write(states[s] + i + u * kStride, state[s][u]);
      }
    }
  });
}

template <typename Rule, typename S>
__device__ __forceinline__ void update_chunk(const DeviceProblem& p, ComputeOf<S> grad_scale,
                                             bool skip, int chunk) {
  using T = ComputeOf<S>;
  const Piece<S> piece = piece_of<S>(p, chunk);
  const uint8_t flags = p.flags[piece.index];
  const S* saved = static_cast<const S*>(p.saved) + piece.at;
  if (!piece.grad || skip) {
    if (flags & kPerturbed) {
      copy(piece.weights, saved, piece.numel, is_aligned(piece.weights));
    }
    return;
  }
  const Hyper<T>& group = static_cast<const Hyper<T>*>(p.hyper)[piece.slot.row];
  const T count = p.step ? T(p.step[piece.index] + 1.0f) : T(1);
  const Step<T> step = make_step(group, grad_scale, count, (flags & kFresh) != 0);
  const S* from = flags & kPerturbed ? saved : piece.weights;
  FUSED_SAM_ASSUME_GLOBAL(from);
  switch (int(group.options)) {
    case 0:
      return update_piece<Rule, 0>(p, piece, from, group, step);
    case 1:
      return update_piece<Rule, 1>(p, piece, from, group, step);
    case 2:
      if constexpr (Rule::kVariants > 2) update_piece<Rule, 2>(p, piece, from, group, step);
      return;
    case 3:
      if constexpr (Rule::kVariants > 3) update_piece<Rule, 3>(p, piece, from, group, step);
      return;
  }
}

// grad_scale, found_inf: one number each, or null. ticket: 0, and 0 again afterwards.
template <typename Rule, typename S>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    update_kernel(DeviceProblem p, const ComputeOf<S>* grad_scale, const float* found_inf,
                  unsigned* ticket) {
  const bool skip = found_inf && *found_inf != 0.0f;
  const ComputeOf<S> scale = grad_scale ? *grad_scale : ComputeOf<S>(1);
  for (int chunk = blockIdx.x; chunk < p.num_chunks; chunk += gridDim.x) {
    update_chunk<Rule, S>(p, scale, skip, chunk);
  }
  if constexpr (Rule::kCounts) {
    // The last block to come here counts the step: all others have read the old count.
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last) return;
    for (int i = threadIdx.x; p.step && !skip && i < p.num_slots; i += kThreads) {
      if (p.grads[i]) p.step[i] += 1.0f;
    }
    if (threadIdx.x == 0) *ticket = 0;
  }
}

}  // namespace fused_sam
