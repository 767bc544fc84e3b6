// The CUDA kernels. They use blocks of kThreads threads, __syncthreads, warp shuffles, static
// shared memory and one integer atomic, and nothing of the host: the tests run this very file on a
// CPU, under an emulation of those.
//
// A chunk is kChunk elements of one parameter; the table of chunks is walked by a persistent grid.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../mathematics.h"
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

// kWidth elements that travel together: in 128-bit accesses (two of them for the average of a half
// precision's gradients), or one element.
template <typename S, int kWidth>
struct Pack {
  S at[kWidth];
};

template <int kWidth, typename S>
__device__ __forceinline__ Pack<S, kWidth> read(const S* from) {
  Pack<S, kWidth> pack;
  if constexpr (kWidth * sizeof(S) % kAccess == 0) {
    uint4 raw[sizeof(pack) / kAccess];
#pragma unroll
    for (unsigned a = 0; a < sizeof(pack) / kAccess; ++a) {
      raw[a] = reinterpret_cast<const uint4*>(from)[a];
    }
    memcpy(&pack, raw, sizeof(pack));
  } else {
    static_assert(kWidth == 1, "an access is 128 bits or one element");
    pack.at[0] = *from;
  }
  return pack;
}

template <int kWidth, typename S>
__device__ __forceinline__ void write(S* to, const Pack<S, kWidth>& pack) {
  if constexpr (kWidth * sizeof(S) % kAccess == 0) {
    uint4 raw[sizeof(pack) / kAccess];
    memcpy(raw, &pack, sizeof(pack));
#pragma unroll
    for (unsigned a = 0; a < sizeof(pack) / kAccess; ++a) {
      reinterpret_cast<uint4*>(to)[a] = raw[a];
    }
  } else {
    *to = pack.at[0];
  }
}

// The part of a parameter that a block works on.
template <typename S>
struct Piece {
  Slot slot;
  int64_t index;  // of the slot
  int32_t flags;
  int64_t at;  // of the first element in the flat buffers
  int numel;
  S* weights;
  const S* grad;  // nowhere if it is missing

  __device__ bool has(int32_t flag) const { return (flags & flag) != 0; }
};

template <typename S>
__device__ __forceinline__ Piece<S> piece_of(const DeviceProblem& p, int chunk) {
  const Chunk c = p.chunks[chunk];
  Piece<S> piece;
  piece.slot = p.slots[c.slot];
  piece.index = c.slot;
  piece.flags = p.flags[c.slot];
  piece.at = piece.slot.start + c.offset;
  const int64_t rest = piece.slot.numel - c.offset;
  piece.numel = static_cast<int>(rest < kChunk ? rest : kChunk);
  piece.weights = reinterpret_cast<S*>(piece.slot.weights) + c.offset;
  piece.grad = p.grads ? reinterpret_cast<const S*>(p.grads[c.slot]) + c.offset : nullptr;
  FUSED_SAM_ASSUME_GLOBAL(piece.weights);
  FUSED_SAM_ASSUME_GLOBAL(piece.grad);
  return piece;
}

template <typename S>
__device__ __forceinline__ ComputeOf<S>* average_of(const DeviceProblem& p, const Piece<S>& piece) {
  return static_cast<ComputeOf<S>*>(p.average) + piece.at;
}

// The hyperparameters of a group.
template <typename Value, typename T>
__device__ __forceinline__ auto columns_of(const DeviceProblem& p, const Slot& slot) {
  using Columns = typename Value::template Columns<T>;
  if constexpr (Value::kColumns == 0) {
    return Columns{};
  } else {
    return static_cast<const Columns*>(p.hyper)[slot.row];
  }
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

template <bool kMax>
__device__ __forceinline__ double warp_all(double x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    x = words::add<kMax>(x, __shfl_xor_sync(0xffffffffu, x, distance));
  }
  return x;
}

// The sum over the block, or the largest, in every thread, always added in the same order.
template <bool kMax>
__device__ __forceinline__ double block_all(double x) {
  __shared__ double warps[kThreads / kWarp];
  x = warp_all<kMax>(x);
  __syncthreads();  // whoever still reads the last sum
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  double all = 0;
#pragma unroll
  for (int warp = 0; warp < kThreads / kWarp; ++warp) all = words::add<kMax>(all, warps[warp]);
  return all;
}

// Whether this is the last block that comes here; all others have done what they do before. ticket
// is 0 at first, and the last block's to set to 0 again.
__device__ __forceinline__ bool is_last(unsigned* ticket) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// ------------------------------------------------------------------------------------------ reduce

template <typename Sums, typename S>
using TermOf = std::conditional_t<Sums::kWide, double, ComputeOf<S>>;

// What the terms get in the gradient's place.
template <typename Average, typename T, typename Group>
__device__ __forceinline__ T direction_of(T grad, [[maybe_unused]] T average,
                                          [[maybe_unused]] const Group& group) {
  if constexpr (Average::kIs) {
    T direction, unused;
    Average::follow(grad, average, group, direction, unused);
    return direction;
  } else {
    return grad;
  }
}

// other: the weights, or what is kept of the gradients at w. average: of these, if the sums have
// one. Adds to `sums` what the piece gives.
template <typename Sums, bool kReads, typename S>
__device__ __forceinline__ void add_terms(
    double (&sums)[Sums::kCount], const Piece<S>& piece, const S* other,
    const ComputeOf<S>* average, const typename Sums::template Columns<TermOf<Sums, S>>& group,
    const typename Sums::template Earlier<TermOf<Sums, S>>& earlier) {
  using T = TermOf<Sums, S>;
  using Average = typename Sums::Average;
  using words::add;
  constexpr int kCount = Sums::kCount;
  T part[kCount] = {};
  for_packs<S, 4>(piece.numel, piece.has(kAligned), [&](auto width, auto unroll, int i) {
    constexpr int kWidth = decltype(width)::value, kUnroll = decltype(unroll)::value;
    constexpr int kStride = kThreads * kWidth;
    Pack<S, kWidth> others[kUnroll], grad[kUnroll];
    Pack<ComputeOf<S>, kWidth> averages[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (kReads) others[u] = read<kWidth>(other + i + u * kStride);
      if (Average::kIs) averages[u] = read<kWidth>(average + i + u * kStride);
      grad[u] = read<kWidth>(piece.grad + i + u * kStride);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const T x = kReads ? T(load(others[u].at[k])) : T(0);
        const T m = Average::kIs ? T(averages[u].at[k]) : T(0);
        const T g = direction_of<Average>(T(load(grad[u].at[k])), m, group);
        T terms[kCount];
        Sums::template terms<kReads>(x, g, group, earlier, terms);
#pragma unroll
        for (int c = 0; c < kCount; ++c) part[c] = add<Sums::kMax>(part[c], terms[c]);
      }
    }
  });
#pragma unroll
  for (int c = 0; c < kCount; ++c) sums[c] = add<Sums::kMax>(sums[c], double(part[c]));
}

// What the sums of all threads come to. Returns whether this is the last block that comes here.
//
// partials: (count, kPartials), scratch. In float64, so that how the grid cuts the sum does not
// show in a total that is rounded to float32. totals: (count,), what it comes to, in the terms'
// type T. ticket: 0 at first, and 0 again afterwards.
template <typename Sums, typename T>
__device__ __forceinline__ bool finish(double (&sums)[Sums::kCount], double* partials,
                                       double* totals, unsigned* ticket) {
  constexpr int kCount = Sums::kCount;
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    sums[c] = block_all<Sums::kMax>(sums[c]);
    // The thread that takes the ticket has stored the partial sums.
    if (threadIdx.x == 0) partials[c * kPartials + blockIdx.x] = sums[c];
  }
  if (!is_last(ticket)) return false;
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    double sum = 0;
    // Past the first-level cache, which may hold what was there before.
    for (int i = threadIdx.x; i < int(gridDim.x); i += kThreads) {
      const double partial = static_cast<volatile double*>(partials)[c * kPartials + i];
      sum = words::add<Sums::kMax>(sum, partial);
    }
    sum = block_all<Sums::kMax>(sum);
    if (threadIdx.x == 0) totals[c] = double(T(sum));
  }
  if (threadIdx.x == 0) *ticket = 0;
  return true;
}

template <typename Sums, typename S>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    reduce_kernel(DeviceProblem p, double* partials, double* totals, unsigned* ticket) {
  using T = TermOf<Sums, S>;
  static_assert(!Sums::kWide || Sums::kColumns == 0, "hyperparameters are in the compute type");
  constexpr int kCount = Sums::kCount;
  const auto earlier = Sums::template earlier<T>(p.earlier);
  double sums[kCount] = {};
  for (int chunk = blockIdx.x; chunk < p.num_chunks; chunk += gridDim.x) {
    const Piece<S> piece = piece_of<S>(p, chunk);
    if (piece.has(kMissing)) continue;
    const auto group = columns_of<Sums, T>(p, piece.slot);
    const S* other = Sums::kReadsKept ? static_cast<const S*>(p.kept) + piece.at : piece.weights;
    const ComputeOf<S>* average = Sums::Average::kIs ? average_of(p, piece) : nullptr;
    if (piece.has(Sums::kReadsKept ? kHeld : kReadsParam)) {
      add_terms<Sums, true>(sums, piece, other, average, group, earlier);
    } else {
      add_terms<Sums, false>(sums, piece, other, average, group, earlier);
    }
  }
  finish<Sums, T>(sums, partials, totals, ticket);
}

// ----------------------------------------------------------------------------------------- ascend_

// average: of the gradients; null if the ascent has none. takes_in: whether it takes these in.
template <typename Ascent, typename S>
__device__ __forceinline__ void climb(
    S* saved, S* kept, ComputeOf<S>* average, const Piece<S>& piece,
    const typename Ascent::template Columns<ComputeOf<S>>& group,
    const typename Ascent::template Scalars<ComputeOf<S>>& scalars, bool takes_in, uint32_t seed) {
  using T = ComputeOf<S>;
  using Average = typename Ascent::Average;
  const bool stays = scalars.scale == T(0);
  const bool is_saved = piece.has(kPerturbed);
  const S* from = is_saved ? saved : piece.weights;
  FUSED_SAM_ASSUME_GLOBAL(from);
  for_packs<S, 2>(piece.numel, piece.has(kAligned), [&](auto width, auto unroll, int i) {
    constexpr int kWidth = decltype(width)::value, kUnroll = decltype(unroll)::value;
    constexpr int kStride = kThreads * kWidth;
    Pack<S, kWidth> weights[kUnroll], grad[kUnroll];
    Pack<T, kWidth> averages[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      weights[u] = read<kWidth>(from + i + u * kStride);
      grad[u] = read<kWidth>(piece.grad + i + u * kStride);
      if (Average::kIs) averages[u] = read<kWidth>(average + i + u * kStride);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      T along[kWidth];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        along[k] = load(grad[u].at[k]);
        if constexpr (Average::kIs) {
          Average::follow(along[k], averages[u].at[k], group, along[k], averages[u].at[k]);
        }
      }
      if (takes_in) write(average + i + u * kStride, averages[u]);
      if (!is_saved) write(saved + i + u * kStride, weights[u]);
      if (kept) write(kept + i + u * kStride, grad[u]);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const S old = weights[u].at[k];
        const S moved = round_stochastically<S>(Ascent::move(load(old), along[k], scalars),
                                                noise_of(piece.at + i + u * kStride + k, seed));
        // 0 * inf is NaN, and a scale of 0 must move nothing.
        weights[u].at[k] = stays ? old : moved;
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

// number_at: where the climb's number is; null: `number`.
template <typename Ascent, typename S>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    ascend_kernel(DeviceProblem p, const double* numbers, int64_t* climbed,
                  const int64_t* number_at, int64_t number) {
  using T = ComputeOf<S>;
  if (number_at) number = *number_at;
  if (blockIdx.x == 0 && threadIdx.x == 0) *climbed = number;
  const uint32_t seed = hash(uint32_t(number));
  // What is not finite stays out of the average.
  const bool takes_in = Ascent::Average::kIs && words::is_finite(T(numbers[0]));
  for (int chunk = blockIdx.x; chunk < p.num_chunks; chunk += gridDim.x) {
    const Piece<S> piece = piece_of<S>(p, chunk);
    if (piece.has(kMissing)) continue;
    const auto group = columns_of<Ascent, T>(p, piece.slot);
    const auto scalars = Ascent::scalars(group, numbers);
    S* saved = static_cast<S*>(p.saved) + piece.at;
    S* kept = p.kept ? static_cast<S*>(p.kept) + piece.at : nullptr;
    T* average = Ascent::Average::kIs ? average_of(p, piece) : nullptr;
    climb<Ascent>(saved, kept, average, piece, group, scalars, takes_in, seed);
  }
}

// ---------------------------------------------------------------------------------------- restore_

template <typename S>
__device__ __forceinline__ void restore(const DeviceProblem& p, const Piece<S>& piece) {
  if (!piece.has(kPerturbed)) return;
  const S* saved = static_cast<const S*>(p.saved) + piece.at;
  copy<S>(piece.weights, saved, piece.numel, piece.has(kAligned));
}

template <typename S>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    restore_kernel(DeviceProblem p, int64_t* climbed) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *climbed = 0;
  for (int chunk = blockIdx.x; chunk < p.num_chunks; chunk += gridDim.x) {
    restore(p, piece_of<S>(p, chunk));
  }
}

// ----------------------------------------------------------------------------------------- update_

// Whether an update may leave a direction: float64 has no register left for it, and half precision
// has none in its own dtype. Only the variant that subtracts does, so that the others pay nothing.
template <bool kAfter, typename S>
constexpr bool kDirects = kAfter && std::is_same_v<S, float>;

// v = a * grad + b * kept, and c * grad + d * kept is subtracted after the rule's step; or it is
// the direction, if `directs`. What has the factor 0 may be anything; kept is null where all of its
// are.
template <typename S>
struct Blended {
  const S* kept;
  bool directs;
  ComputeOf<S> a, b, c, d;
};

template <typename T>
__device__ __forceinline__ T scaled(T factor, T x) {
  return factor == T(0) ? T(0) : factor * x;
}

// What a blend makes of the gradients of a piece.
template <bool kAfter, typename S>
__device__ __forceinline__ Blended<S> blended_of(const DeviceProblem& p, const Piece<S>& piece,
                                                 ComputeOf<S> lr) {
  using T = ComputeOf<S>;
  if (!piece.has(kBlends)) return {nullptr, false, T(1), T(0), T(0), T(0)};
  const double scale = p.loss_scale ? *p.loss_scale : 1;
  Coefficients found = {1, 0};
  int number = 0;
#define FUSED_SAM_COEFFICIENTS(value)                                          \
  if (p.blend == number++) {                                                   \
    const auto* groups = static_cast<const value::Columns<T>*>(p.blend_hyper); \
    found = value::coefficients(groups[piece.slot.row], p.numbers, scale);     \
  }
  FUSED_SAM_BLENDS(FUSED_SAM_COEFFICIENTS)
#undef FUSED_SAM_COEFFICIENTS
  double rate = piece.has(kMaximize) ? -double(lr) : double(lr);
  const bool directs = kDirects<kAfter, S> && p.direction;
  if (directs) {
    found = {1, 0, found.a, found.b};  // the rule sees the gradient
    rate = 1;
  }
  const bool looks = piece.has(kHeld) && (found.b != 0 || found.d != 0);
  return {looks ? static_cast<const S*>(p.kept) + piece.at : nullptr,
          directs,
          T(found.a),
          T(found.b),
          T(rate * found.c),
          T(rate * found.d)};
}

// What an update does besides, where a climb along the momentum comes next.
template <typename S>
struct Ahead {
  S* to;                // where the new weights go
  ComputeOf<S> decay;   // of the weights, ahead of w, on the way from there
  ComputeOf<S> square;  // gets that of the new momentum
};

// weights and from may be the same memory. ahead: nobody looks at it without kAhead.
template <typename Rule, bool kAfter, bool kAhead, unsigned kKept, typename S>
__device__ __forceinline__ void update_piece(
    const DeviceProblem& p, const Piece<S>& piece, const S* from, const Blended<S>& blended,
    Ahead<S>& ahead, ComputeOf<S> descent, bool frozen,
    const typename Rule::template Scalars<ComputeOf<S>>& scalars) {
  using T = ComputeOf<S>;
  S* states[kMaxStates];
#pragma unroll
  for (int k = 0; k < kMaxStates; ++k) {
    states[k] = kKept & 1u << k ? static_cast<S*>(p.states[k]) + piece.at : nullptr;
  }
  const bool decays = kAhead && ahead.decay != T(0);
  // Two accesses in flight for each buffer where the registers suffice.
  constexpr int kMaxUnroll = sizeof(S) == 4 && !(kKept & 4u) ? 2 : 1;
  for_packs<S, kMaxUnroll>(piece.numel, piece.has(kAligned), [&](auto width, auto unroll, int i) {
    constexpr int kWidth = decltype(width)::value, kUnroll = decltype(unroll)::value;
    constexpr int kStride = kThreads * kWidth;
    Pack<S, kWidth> weights[kUnroll], grad[kUnroll], kept[kUnroll], state[kMaxStates][kUnroll];
    Pack<S, kWidth> there[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      weights[u] = read<kWidth>(from + i + u * kStride);
      grad[u] = read<kWidth>(piece.grad + i + u * kStride);
      if (blended.kept) kept[u] = read<kWidth>(blended.kept + i + u * kStride);
      if (kAhead && decays) there[u] = read<kWidth>(piece.weights + i + u * kStride);
#pragma unroll
      for (int s = 0; s < kMaxStates; ++s) {
        if (!(kKept & 1u << s)) continue;
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
          if (kKept & 1u << s) buffers[s] = load(state[s][u].at[k]);
        }
        const S old = weights[u].at[k];
        const T second = load(grad[u].at[k]);
        T gradient = scaled(blended.a, second), after = T(0);
        if (kAfter) after = scaled(blended.c, second);
        if (blended.kept) {
          const T first = load(kept[u].at[k]);
          gradient += scaled(blended.b, first);
          if (kAfter) after += scaled(blended.d, first);
        }
        T downhill = descent * gradient;
        if (kAhead && decays) downhill += ahead.decay * (load(there[u].at[k]) - load(old));
        T stepped = Rule::template update<kKept>(load(old), downhill, buffers, scalars);
        if constexpr (kDirects<kAfter, S>) {
          if (blended.directs) {
            grad[u].at[k] = after;
            after = T(0);
          }
        }
        if (kAfter) stepped -= after;
        const S updated = round_to<S>(stepped);
#pragma unroll
        for (int s = 0; s < kMaxStates; ++s) {
          if (kKept & 1u << s) state[s][u].at[k] = round_to<S>(buffers[s]);
        }
        if constexpr (kAhead) {  // by itself: without a momentum the shift would be negative
          if constexpr (kKept >> Rule::kMomentum & 1u) {
            const T v = load(state[Rule::kMomentum][u].at[k]);
            T terms[1];
            Squares::terms<false>(T(0), v, {}, {}, terms);
            ahead.square += terms[0];
          }
        }
        // 0 * inf is NaN and -0.0 - -0.0 is 0.0: with lr 0 only a copy gives the bits back.
        weights[u].at[k] = frozen ? old : updated;
      }
      write((kAhead ? ahead.to : piece.weights) + i + u * kStride, weights[u]);
      if constexpr (kDirects<kAfter, S>) {
        if (blended.directs) {
          write(static_cast<T*>(p.direction) + piece.at + i + u * kStride, grad[u]);
        }
      }
#pragma unroll
      for (int s = 0; s < kMaxStates; ++s) {
        if (kKept & 1u << s) write(states[s] + i + u * kStride, state[s][u]);
      }
    }
  });
}

// Calls f with the states that a group keeps as a constant.
template <typename Rule, unsigned kMask = 0, typename F>
__device__ __forceinline__ void with_kept(unsigned kept, const F& f) {
  if constexpr ((kMask & Rule::kAlways) == Rule::kAlways) {
    if (kept == kMask) return f(std::integral_constant<unsigned, kMask>());
  }
  if constexpr (kMask + 1 < 1u << Rule::kStates) with_kept<Rule, kMask + 1>(kept, f);
}

// square: gets that of the new momentum, with kAhead.
template <typename Rule, bool kAfter, bool kAhead, typename S>
__device__ __forceinline__ void update_chunk(const DeviceProblem& p, ComputeOf<S> grad_scale,
                                             bool skip, int chunk, double& square) {
  using T = ComputeOf<S>;
  const Piece<S> piece = piece_of<S>(p, chunk);
  const bool steps = !piece.has(kMissing) && !skip;
  S* const saved = static_cast<S*>(p.saved) + piece.at;
  const bool stays = kAhead && piece.has(kStays) && piece.has(kPerturbed) && !piece.has(kMissing);
  if (!steps && !stays) restore(p, piece);
  if constexpr (kAhead) {
    // Of a momentum that is not stepped.
    const bool kept = unsigned(piece.flags) >> (kKeptShift + Rule::kMomentum) & 1u;
    if (piece.has(kSummed) && !piece.has(kMissing) && !(steps && kept)) {
      Piece<S> momentum = piece;
      momentum.grad = static_cast<const S*>(p.states[Rule::kMomentum]) + piece.at;
      double squares[1] = {};
      add_terms<Squares, false, S>(squares, momentum, nullptr, nullptr, {}, {});
      square += squares[0];
    }
  }
  if (!steps) return;
  const auto group = columns_of<Rule, T>(p, piece.slot);
  const T count = p.step ? T(p.step[piece.index] + 1.0f) : T(1);
  const auto scalars = Rule::scalars(group, count, piece.has(kFresh));
  const T descent = (piece.has(kMaximize) ? T(-1) : T(1)) / grad_scale;
  const S* from = piece.has(kPerturbed) ? saved : piece.weights;
  FUSED_SAM_ASSUME_GLOBAL(from);
  Blended<S> blended = {};
  Ahead<S> ahead = {};
  if constexpr (kAhead) {
    blended.a = T(1);
    ahead.to = stays ? saved : piece.weights;
    FUSED_SAM_ASSUME_GLOBAL(ahead.to);
    const bool decays = p.decay && piece.has(kPerturbed);
    ahead.decay = decays ? static_cast<const T*>(p.decay)[piece.slot.row] : T(0);
  } else {
    blended = blended_of<kAfter>(p, piece, group.lr);
  }
  with_kept<Rule>(unsigned(piece.flags) >> kKeptShift & kKeptMask, [&](auto kept) {
    update_piece<Rule, kAfter, kAhead, kept.value>(p, piece, from, blended, ahead, descent,
                                                   group.lr == T(0), scalars);
  });
  if (kAhead && piece.has(kSummed)) square += double(ahead.square);
}

// The last block of a launch counts the step.
__device__ __forceinline__ void count_steps(const DeviceProblem& p, bool skip) {
  for (int i = threadIdx.x; !skip && i < p.num_slots; i += kThreads) {
    if (!(p.flags[i] & kMissing)) p.step[i] += 1.0f;
  }
}

// grad_scale, found_inf: one number each, or null. ticket: 0, and 0 again afterwards. kAfter:
// p.after. kAhead: a climb along the momentum comes next, of which p.total gets the squares.
template <typename Rule, typename S, bool kAfter = false, bool kAhead = false>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    update_kernel(DeviceProblem p, const ComputeOf<S>* grad_scale, const float* found_inf,
                  unsigned* ticket, int64_t* climbed) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *climbed = 0;
  const bool skip = found_inf && *found_inf != 0.0f;
  const ComputeOf<S> scale = grad_scale ? *grad_scale : ComputeOf<S>(1);
  double square[1] = {};
  for (int chunk = blockIdx.x; chunk < p.num_chunks; chunk += gridDim.x) {
    update_chunk<Rule, kAfter, kAhead, S>(p, scale, skip, chunk, square[0]);
  }
  // The last block to come here counts the step: all others have read the old count.
  if constexpr (kAhead) {
    if (finish<Squares, ComputeOf<S>>(square, p.partials, p.total, ticket) && Rule::kCounts) {
      count_steps(p, skip);
    }
  } else if constexpr (Rule::kCounts) {
    if (!is_last(ticket)) return;
    count_steps(p, skip);
    if (threadIdx.x == 0) *ticket = 0;
  }
}

}  // namespace fused_sam
