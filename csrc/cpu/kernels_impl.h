// The CPU kernels. Compiled once for each instruction set, with FUSED_SAM_ISA its name: the loops
// are plain, and the compiler vectorises them. Nothing here may use inline functions of other
// headers, whose code the linker could share between the instruction sets.
#pragma once

#include "kernels.h"

#include "../rules.h"
#include "../storage.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__clang__)
#define FUSED_SAM_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define FUSED_SAM_VECTORIZE _Pragma("GCC ivdep")
#else
#define FUSED_SAM_VECTORIZE __pragma(loop(ivdep))
#endif

namespace fused_sam {
inline namespace FUSED_SAM_ISA {
namespace {

// Elements that are computed at a time where the result is streamed: they wait in L1.
constexpr int64_t kTile = 512;

// Lanes of the partial sums: a multiple of every vector length, so that all give the same bits.
constexpr int kLanes = 64;

// Additions in the compute type before a lane goes into its float64 sum: bounds the rounding.
constexpr int kRun = 16;

template <typename S>
using ComputeOf = typename Compute<S>::Type;

template <typename S>
struct Piece {
  const Slot* slot;
  int64_t index;   // of the slot
  int64_t offset;  // within the slot
  int64_t numel;
  S* weights;
  const S* grad;  // or null
};

// Calls f(piece) for each part of a slot that lies in the elements [begin, end).
template <typename S, typename F>
FUSED_SAM_INLINE void for_each_piece(const Problem& p, int64_t begin, int64_t end, const F& f) {
  // The last slot that starts at or before `begin`. Of several (empty ones) any will do: the
  // elements are those of the last.
  int64_t low = 0, high = p.num_slots;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (p.slots[middle].start <= begin ? low : high) = middle;
  }
  for (int64_t i = low; i < p.num_slots && p.slots[i].start < end; ++i) {
    const Slot& slot = p.slots[i];
    const int64_t first = begin > slot.start ? begin - slot.start : 0;
    const int64_t stop = end - slot.start < slot.numel ? end - slot.start : slot.numel;
    if (first >= stop) continue;
    S* weights = i < p.num_moved ? static_cast<S*>(p.weights) + slot.start
                                 : static_cast<S*>(p.pinned[i - p.num_moved]);
    const S* grad = reinterpret_cast<const S*>(p.grads[i]);
    f(Piece<S>{&slot, i, first, stop - first, weights + first, grad ? grad + first : grad});
  }
}

// -------------------------------------------------------------------------------------------- copy

constexpr uintptr_t kLine = 64;

template <typename S>
FUSED_SAM_INLINE void copy(S* to, const S* from, int64_t n) {
  FUSED_SAM_VECTORIZE
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// A copy that does not read the target into the caches first.
template <typename S>
FUSED_SAM_INLINE void stream(S* to, const S* from, int64_t n) {
  int64_t i = 0;
#if defined(__SSE2__)
  if (reinterpret_cast<uintptr_t>(to) % kLine == 0) {
    const char* source = reinterpret_cast<const char*>(from);
    char* target = reinterpret_cast<char*>(to);
    const int64_t lines = n * int64_t(sizeof(S)) / int64_t(kLine);
    for (int64_t line = 0; line < lines; ++line, source += kLine, target += kLine) {
#if defined(__AVX512F__)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(target), _mm512_loadu_si512(source));
#elif defined(__AVX__)
      for (int k = 0; k < 64; k += 32)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(target + k),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + k)));
#else
      for (int k = 0; k < 64; k += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(target + k),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + k)));
#endif
    }
    i = lines * int64_t(kLine / sizeof(S));
  }
#endif
  copy(to + i, from + i, n - i);
}

// Asks for memory that a pass will read soon. The hardware's own prefetching stops at a page's end,
// which a pass that only reads is fast enough to feel.
constexpr int64_t kAhead = 8192;

FUSED_SAM_INLINE void prefetch(const void* memory, int64_t bytes) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < bytes; i += int64_t(kLine)) {
    __builtin_prefetch(static_cast<const char*>(memory) + i);
  }
#else
  (void)memory, (void)bytes;
#endif
}

// Streamed stores become visible to other threads only after this.
FUSED_SAM_INLINE void end_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// ----------------------------------------------------------------------------------------- sq_norm

template <typename S, bool kAdaptive>
FUSED_SAM_INLINE void add_squares(double (&sums)[kLanes], const S* weights, const S* grad,
                                  int64_t n, ComputeOf<S> eta) {
  using T = ComputeOf<S>;
  int64_t i = 0;
  while (i < n) {
    alignas(64) T run[kLanes] = {};
    for (int k = 0; k < kRun && i + kLanes <= n; ++k, i += kLanes) {
      constexpr int64_t kStep = kLanes * sizeof(S), kNext = kAhead / sizeof(S);
      if (i + kNext + kLanes <= n) prefetch(grad + i + kNext, kStep);
      FUSED_SAM_VECTORIZE
      for (int lane = 0; lane < kLanes; ++lane) {
        const T w = kAdaptive ? load(weights[i + lane]) : T(0);
        const T x = ascent_dual(w, load(grad[i + lane]), kAdaptive, eta);
        run[lane] += x * x;
      }
    }
    if (n - i < kLanes) {
      for (int lane = 0; i < n; ++lane, ++i) {
        const T w = kAdaptive ? load(weights[i]) : T(0);
        const T x = ascent_dual(w, load(grad[i]), kAdaptive, eta);
        run[lane] += x * x;
      }
    }
    FUSED_SAM_VECTORIZE
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += double(run[lane]);
  }
}

template <typename S>
void sq_norm(const Problem& p, bool by_group, void* partials, int64_t begin, int64_t end) {
  using T = ComputeOf<S>;
  const Hyper<T>* hyper = static_cast<const Hyper<T>*>(p.hyper);
  for (int64_t span = begin; span < end; ++span) {
    alignas(64) double sums[kLanes] = {};
    for_each_piece<S>(p, span * kSpan, (span + 1) * kSpan, [&](const Piece<S>& piece) {
      if (!piece.grad) return;
      if (by_group && hyper[piece.slot->row].adaptive != T(0)) {
        add_squares<S, true>(sums, piece.weights, piece.grad, piece.numel,
                             hyper[piece.slot->row].eta);
      } else {
        add_squares<S, false>(sums, piece.weights, piece.grad, piece.numel, T(0));
      }
    });
    double sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
    static_cast<T*>(partials)[span] = T(sum);
  }
}

// ---------------------------------------------------------------------------------------- perturb_

template <typename S, bool kAdaptive>
FUSED_SAM_INLINE void climb(S* weights, const S* grad, int64_t n, ComputeOf<S> scale,
                            ComputeOf<S> eta) {
  FUSED_SAM_VECTORIZE
  for (int64_t i = 0; i < n; ++i) {
    weights[i] = round_to<S>(ascend(load(weights[i]), load(grad[i]), scale, kAdaptive, eta));
  }
}

template <typename S>
void perturb_(const Problem& p, const void* sq_norm, int64_t begin, int64_t end) {
  using T = ComputeOf<S>;
  const Hyper<T>* hyper = static_cast<const Hyper<T>*>(p.hyper);
  // Forwards: walking back over what sq_norm left in the caches upsets the hardware's prefetching
  // and loses more than it finds.
  for (int64_t span = begin; span < end; ++span) {
    for_each_piece<S>(p, span * kSpan, (span + 1) * kSpan, [&](const Piece<S>& piece) {
      if (!piece.grad) return;
      const Hyper<T>& group = hyper[piece.slot->row];
      const T scale = ascent_scale(group.rho, *static_cast<const T*>(sq_norm));
      S* saved = static_cast<S*>(p.saved) + piece.slot->start + piece.offset;
      for (int64_t i = 0; i < piece.numel; i += kTile) {
        const int64_t n = piece.numel - i < kTile ? piece.numel - i : kTile;
        S* weights = piece.weights + i;
        (p.stream ? stream<S> : copy<S>)(saved + i, weights, n);
        if (scale == T(0)) continue;
        if (group.adaptive != T(0)) {
          climb<S, true>(weights, piece.grad + i, n, scale, group.eta);
        } else {
          climb<S, false>(weights, piece.grad + i, n, scale, group.eta);
        }
      }
    });
  }
  if (p.stream) end_streaming();
}

// ----------------------------------------------------------------------------------------- update_

// weights and from may be the same memory.
template <typename Rule, int kOptions, typename S>
FUSED_SAM_INLINE void step(S* weights, const S* from, const S* grad, S* const (&states)[kMaxStates],
                           int64_t n, const Hyper<ComputeOf<S>>& group_,
                           const Step<ComputeOf<S>>& step_) {
  using T = ComputeOf<S>;
  // Copies: the stores below cannot change them, which the compiler does not know of references.
  const Hyper<T> group = group_;
  const Step<T> step = step_;
  const bool frozen = group.lr == T(0);
  S* const state0 = states[0];
  S* const state1 = states[1];
  S* const state2 = states[2];
  FUSED_SAM_VECTORIZE
  for (int64_t i = 0; i < n; ++i) {
    T state[kMaxStates] = {};
    if (Rule::uses(kOptions, 0)) state[0] = load(state0[i]);
    if (Rule::uses(kOptions, 1)) state[1] = load(state1[i]);
    if (Rule::uses(kOptions, 2)) state[2] = load(state2[i]);
    const S old = from[i];
    const S updated =
        round_to<S>(Rule::template update<kOptions>(load(old), load(grad[i]), state, group, step));
    if (Rule::uses(kOptions, 0)) state0[i] = round_to<S>(state[0]);
    if (Rule::uses(kOptions, 1)) state1[i] = round_to<S>(state[1]);
    if (Rule::uses(kOptions, 2)) state2[i] = round_to<S>(state[2]);
    // 0 * inf is NaN and -0.0 - -0.0 is 0.0: with lr 0 only a copy gives the bits back.
    weights[i] = frozen ? old : updated;
  }
}

template <typename Rule, int kOptions, typename S>
void update_piece(const Problem& p, const Piece<S>& piece, const S* from,
                  const Hyper<ComputeOf<S>>& group, const Step<ComputeOf<S>>& scalars) {
  const int64_t at = piece.slot->start + piece.offset;
  // Streamed where the old weights were not read from there.
  const bool streams = p.stream && from != piece.weights;
  alignas(64) S tile[kTile];
  for (int64_t i = 0; i < piece.numel; i += kTile) {
    const int64_t n = piece.numel - i < kTile ? piece.numel - i : kTile;
    S* states[kMaxStates] = {};
    for (int k = 0; k < kMaxStates; ++k) {
      if (Rule::uses(kOptions, k)) states[k] = static_cast<S*>(p.states[k]) + at + i;
    }
    step<Rule, kOptions, S>(streams ? tile : piece.weights + i, from + i, piece.grad + i, states, n,
                            group, scalars);
    if (streams) stream(piece.weights + i, tile, n);
  }
}

template <typename Rule, typename S>
void update_(const Problem& p, double grad_scale, bool skip, int64_t begin, int64_t end) {
  using T = ComputeOf<S>;
  const Hyper<T>* hyper = static_cast<const Hyper<T>*>(p.hyper);
  for (int64_t span = begin; span < end; ++span) {
    for_each_piece<S>(p, span * kSpan, (span + 1) * kSpan, [&](const Piece<S>& piece) {
      const uint8_t flags = p.flags[piece.index];
      const S* saved = static_cast<const S*>(p.saved) + piece.slot->start + piece.offset;
      if (!piece.grad || skip) {
        if (flags & kPerturbed) {
          (p.stream ? stream<S> : copy<S>)(piece.weights, saved, piece.numel);
        }
        return;
      }
      const Hyper<T>& group = hyper[piece.slot->row];
      const Step<T> scalars = make_step(
          group, T(grad_scale), p.step ? T(p.step[piece.index]) : T(1), (flags & kFresh) != 0);
      const S* from = flags & kPerturbed ? saved : piece.weights;
      switch (int(group.options)) {
        case 0:
          return update_piece<Rule, 0>(p, piece, from, group, scalars);
        case 1:
          return update_piece<Rule, 1>(p, piece, from, group, scalars);
        case 2:
          if constexpr (Rule::kVariants > 2) update_piece<Rule, 2>(p, piece, from, group, scalars);
          return;
        case 3:
          if constexpr (Rule::kVariants > 3) update_piece<Rule, 3>(p, piece, from, group, scalars);
          return;
      }
    });
  }
  if (p.stream) end_streaming();
}

}  // namespace

#define FUSED_SAM_STRING_(x) #x
#define FUSED_SAM_STRING(x) FUSED_SAM_STRING_(x)

extern const Kernels kKernels;
const Kernels kKernels = {
    FUSED_SAM_STRING(FUSED_SAM_ISA),
    {sq_norm<float>, sq_norm<double>, sq_norm<BFloat16>, sq_norm<Float16>},
    {perturb_<float>, perturb_<double>, perturb_<BFloat16>, perturb_<Float16>},
    {{update_<Sgd, float>, update_<Sgd, double>, update_<Sgd, BFloat16>, update_<Sgd, Float16>},
     {update_<Adam, float>, update_<Adam, double>, update_<Adam, BFloat16>, update_<Adam, Float16>},
     {update_<RmsProp, float>, update_<RmsProp, double>, update_<RmsProp, BFloat16>,
      update_<RmsProp, Float16>}},
};

}  // namespace FUSED_SAM_ISA
}  // namespace fused_sam
