// The CPU kernels. Compiled once for each instruction set, with FUSED_SAM_ISA its name: the loops
// are plain, and the compiler vectorises them. Nothing here may use inline functions of other
// headers, whose code the linker could share between the instruction sets.
#pragma once

#include "kernels.h"

#include "../mathematics.h"
#include "../storage.h"

#include <type_traits>

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
  int64_t index;  // of the slot
  int32_t flags;
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
    const bool missing = !p.grads || p.flags[i] & kMissing;
    const S* grad = missing ? nullptr : reinterpret_cast<const S*>(p.grads[i]) + first;
    f(Piece<S>{&slot, i, p.flags[i], first, stop - first, weights + first, grad});
  }
}

// The hyperparameters of a group. A copy: no store can change it, which the compiler does not know
// of a reference.
template <typename Value, typename T>
FUSED_SAM_INLINE auto columns_of(const Problem& p, const Slot& slot) {
  using Columns = typename Value::template Columns<T>;
  if constexpr (Value::kColumns == 0) {
    return Columns{};
  } else {
    return static_cast<const Columns*>(p.hyper)[slot.row];
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

// ------------------------------------------------------------------------------------------ reduce

template <typename Sums, typename S>
using TermOf = std::conditional_t<Sums::kWide, double, ComputeOf<S>>;

// other: the weights, or what is kept of the gradients at w.
template <typename Sums, bool kReads, typename S>
FUSED_SAM_INLINE void add_terms(double (&sums)[Sums::kCount][kLanes], const S* other, const S* grad,
                                int64_t n,
                                const typename Sums::template Columns<TermOf<Sums, S>>& group,
                                const typename Sums::template Earlier<TermOf<Sums, S>>& earlier) {
  using T = TermOf<Sums, S>;
  using words::add;
  constexpr int kCount = Sums::kCount;
  int64_t i = 0;
  while (i < n) {
    alignas(64) T run[kCount][kLanes] = {};
    for (int k = 0; k < kRun && i + kLanes <= n; ++k, i += kLanes) {
      constexpr int64_t kStep = kLanes * sizeof(S), kNext = kAhead / sizeof(S);
      if (i + kNext + kLanes <= n) prefetch(grad + i + kNext, kStep);
      FUSED_SAM_VECTORIZE
      for (int lane = 0; lane < kLanes; ++lane) {
        const T x = kReads ? T(load(other[i + lane])) : T(0);
        T terms[kCount];
        Sums::template terms<kReads>(x, T(load(grad[i + lane])), group, earlier, terms);
        for (int c = 0; c < kCount; ++c) run[c][lane] = add<Sums::kMax>(run[c][lane], terms[c]);
      }
    }
    if (n - i < kLanes) {
      for (int lane = 0; i < n; ++lane, ++i) {
        const T x = kReads ? T(load(other[i])) : T(0);
        T terms[kCount];
        Sums::template terms<kReads>(x, T(load(grad[i])), group, earlier, terms);
        for (int c = 0; c < kCount; ++c) run[c][lane] = add<Sums::kMax>(run[c][lane], terms[c]);
      }
    }
    for (int c = 0; c < kCount; ++c) {
      FUSED_SAM_VECTORIZE
      for (int lane = 0; lane < kLanes; ++lane) {
        sums[c][lane] = add<Sums::kMax>(sums[c][lane], double(run[c][lane]));
      }
    }
  }
}

template <typename Sums, typename S>
void reduce(const Problem& p, void* partials, int64_t begin, int64_t end) {
  using T = TermOf<Sums, S>;
  static_assert(!Sums::kWide || Sums::kColumns == 0, "hyperparameters are in the compute type");
  const auto earlier = Sums::template earlier<T>(p.earlier);
  for (int64_t span = begin; span < end; ++span) {
    alignas(64) double sums[Sums::kCount][kLanes] = {};
    for_each_piece<S>(p, span * kSpan, (span + 1) * kSpan, [&](const Piece<S>& piece) {
      if (!piece.grad) return;
      const auto group = columns_of<Sums, T>(p, *piece.slot);
      const S* other = Sums::kReadsKept
                           ? static_cast<const S*>(p.kept) + piece.slot->start + piece.offset
                           : piece.weights;
      if (piece.flags & (Sums::kReadsKept ? kHeld : kReadsParam)) {
        add_terms<Sums, true>(sums, other, piece.grad, piece.numel, group, earlier);
      } else {
        add_terms<Sums, false>(sums, other, piece.grad, piece.numel, group, earlier);
      }
    });
    for (int c = 0; c < Sums::kCount; ++c) {
      double sum = 0;
      for (int lane = 0; lane < kLanes; ++lane) sum = words::add<Sums::kMax>(sum, sums[c][lane]);
      static_cast<T*>(partials)[c * num_spans(p.size) + span] = T(sum);
    }
  }
}

// ----------------------------------------------------------------------------------------- ascend_

// at: the offset of the first element in the flat buffers.
template <typename Ascent, typename S>
FUSED_SAM_INLINE void climb(S* weights, const S* grad, int64_t n,
                            const typename Ascent::template Scalars<ComputeOf<S>>& scalars_,
                            int64_t at, uint32_t seed) {
  const auto scalars = scalars_;
  FUSED_SAM_VECTORIZE
  for (int64_t i = 0; i < n; ++i) {
    const ComputeOf<S> moved = Ascent::move(load(weights[i]), load(grad[i]), scalars);
    weights[i] = round_stochastically<S>(moved, noise_of(at + i, seed));
  }
}

template <typename Ascent, typename S>
void ascend_(const Problem& p, const double* numbers, int64_t number, int64_t begin, int64_t end) {
  using T = ComputeOf<S>;
  const uint32_t seed = hash(uint32_t(number));
  // Forwards: walking back over what reduce left in the caches upsets the hardware's prefetching
  // and loses more than it finds.
  for (int64_t span = begin; span < end; ++span) {
    for_each_piece<S>(p, span * kSpan, (span + 1) * kSpan, [&](const Piece<S>& piece) {
      if (!piece.grad) return;
      const auto scalars = Ascent::scalars(columns_of<Ascent, T>(p, *piece.slot), numbers);
      const int64_t at = piece.slot->start + piece.offset;
      S* saved = static_cast<S*>(p.saved) + at;
      S* kept = p.kept ? static_cast<S*>(p.kept) + at : nullptr;
      for (int64_t i = 0; i < piece.numel; i += kTile) {
        const int64_t n = piece.numel - i < kTile ? piece.numel - i : kTile;
        S* weights = piece.weights + i;
        (p.stream ? stream<S> : copy<S>)(saved + i, weights, n);
        if (kept) (p.stream ? stream<S> : copy<S>)(kept + i, piece.grad + i, n);
        // 0 * inf is NaN, and a scale of 0 must move nothing.
        if (scalars.scale != T(0)) climb<Ascent>(weights, piece.grad + i, n, scalars, at + i, seed);
      }
    });
  }
  if (p.stream) end_streaming();
}

// ---------------------------------------------------------------------------------------- restore_

template <typename S>
FUSED_SAM_INLINE void restore(const Problem& p, const Piece<S>& piece) {
  const S* saved = static_cast<const S*>(p.saved) + piece.slot->start + piece.offset;
  (p.stream ? stream<S> : copy<S>)(piece.weights, saved, piece.numel);
}

template <typename S>
void restore_(const Problem& p, int64_t begin, int64_t end) {
  for_each_piece<S>(p, begin * kSpan, end * kSpan, [&](const Piece<S>& piece) {
    if (piece.flags & kPerturbed) restore(p, piece);
  });
  if (p.stream) end_streaming();
}

// ----------------------------------------------------------------------------------------- update_

// What a blend makes of the gradients of a slot.
template <typename T>
FUSED_SAM_INLINE Coefficients coefficients_of(const Problem& p, const Slot& slot, int32_t flags) {
  Coefficients found = {1, 0};
  if (!(flags & kBlends)) return found;
  const double scale = p.loss_scale ? *p.loss_scale : 1;
  int number = 0;
#define FUSED_SAM_COEFFICIENTS(value)                                            \
  if (p.blend == number++) {                                                     \
    using Columns = value::Columns<T>;                                           \
    const Columns& group = static_cast<const Columns*>(p.blend_hyper)[slot.row]; \
    found = value::coefficients(group, p.numbers, scale);                        \
  }
  FUSED_SAM_BLENDS(FUSED_SAM_COEFFICIENTS)
#undef FUSED_SAM_COEFFICIENTS
  if (!(flags & kHeld)) found.b = found.d = 0;
  return found;
}

// x * grad + y * kept; what has the factor 0 may be anything.
template <typename T, typename S>
FUSED_SAM_INLINE void mix(T* mixed, const S* grad, const S* kept, int64_t n, T x, T y) {
  const bool reads = x != T(0);
  FUSED_SAM_VECTORIZE
  for (int64_t i = 0; i < n; ++i) mixed[i] = reads ? x * load(grad[i]) : T(0);
  if (y == T(0)) return;
  FUSED_SAM_VECTORIZE
  for (int64_t i = 0; i < n; ++i) mixed[i] += y * load(kept[i]);
}

// What a blend subtracts after the rule's step. weights and from may be the same memory.
template <typename T, typename S>
FUSED_SAM_INLINE void subtract(S* weights, const S* from, const T* stepped, const T* after,
                               int64_t n, bool frozen) {
  FUSED_SAM_VECTORIZE
  for (int64_t i = 0; i < n; ++i) {
    const S old = from[i];
    const S updated = round_to<S>(stepped[i] - after[i]);
    weights[i] = frozen ? old : updated;
  }
}

// weights and from may be the same memory. G: the gradients' type, or T for what was blended. W:
// that of the weights, or T where they are not done with.
template <typename Rule, unsigned kKept, typename S, typename G, typename W>
FUSED_SAM_INLINE void step(W* weights, const S* from, const G* grad, S* const (&states)[kMaxStates],
                           int64_t n, ComputeOf<S> descent, bool frozen,
                           const typename Rule::template Scalars<ComputeOf<S>>& scalars_) {
  using T = ComputeOf<S>;
  // Copies: the stores below cannot change them, which the compiler does not know of references.
  const auto scalars = scalars_;
  S* const state0 = states[0];
  S* const state1 = states[1];
  S* const state2 = states[2];
  FUSED_SAM_VECTORIZE
  for (int64_t i = 0; i < n; ++i) {
    T state[kMaxStates] = {};
    if (kKept & 1u) state[0] = load(state0[i]);
    if (kKept & 2u) state[1] = load(state1[i]);
    if (kKept & 4u) state[2] = load(state2[i]);
    const S old = from[i];
    const W updated = round_to<W>(
        Rule::template update<kKept>(load(old), descent * load(grad[i]), state, scalars));
    if (kKept & 1u) state0[i] = round_to<S>(state[0]);
    if (kKept & 2u) state1[i] = round_to<S>(state[1]);
    if (kKept & 4u) state2[i] = round_to<S>(state[2]);
    // 0 * inf is NaN and -0.0 - -0.0 is 0.0: with lr 0 only a copy gives the bits back.
    if constexpr (std::is_same_v<W, S>) {
      weights[i] = frozen ? old : updated;
    } else {
      weights[i] = updated;
    }
  }
}

// Calls f with the states that a group keeps as a constant.
template <typename Rule, unsigned kMask = 0, typename F>
FUSED_SAM_INLINE void with_kept(unsigned kept, const F& f) {
  if constexpr ((kMask & Rule::kAlways) == Rule::kAlways) {
    if (kept == kMask) return f(std::integral_constant<unsigned, kMask>());
  }
  if constexpr (kMask + 1 < 1u << Rule::kStates) with_kept<Rule, kMask + 1>(kept, f);
}

template <typename Rule, typename S>
void update_(const Problem& p, double grad_scale, bool skip, int64_t begin, int64_t end) {
  using T = ComputeOf<S>;
  for_each_piece<S>(p, begin * kSpan, end * kSpan, [&](const Piece<S>& piece) {
    if (!piece.grad || skip) {
      if (piece.flags & kPerturbed) restore(p, piece);
      return;
    }
    const auto group = columns_of<Rule, T>(p, *piece.slot);
    const T descent = (piece.flags & kMaximize ? T(-1) : T(1)) / T(grad_scale);
    const auto scalars =
        Rule::scalars(group, p.step ? T(p.step[piece.index]) : T(1), (piece.flags & kFresh) != 0);
    const int64_t at = piece.slot->start + piece.offset;
    const S* from = piece.flags & kPerturbed ? static_cast<const S*>(p.saved) + at : piece.weights;
    const Coefficients coefficients = coefficients_of<T>(p, *piece.slot, piece.flags);
    // Streamed where the old weights were not read from there.
    const bool streams = p.stream && from != piece.weights;
    with_kept<Rule>(unsigned(piece.flags) >> kKeptShift, [&](auto kept) {
      alignas(64) S tile[kTile];
      for (int64_t i = 0; i < piece.numel; i += kTile) {
        const int64_t n = piece.numel - i < kTile ? piece.numel - i : kTile;
        S* states[kMaxStates] = {};
        for (int k = 0; k < kMaxStates; ++k) {
          if (kept.value & 1u << k) states[k] = static_cast<S*>(p.states[k]) + at + i;
        }
        S* weights = streams ? tile : piece.weights + i;
        const auto go = [&](auto* to, const auto* grad) {
          step<Rule, kept.value>(to, from + i, grad, states, n, descent, group.lr == T(0), scalars);
        };
        if (piece.flags & kBlends) {
          const S* first = static_cast<const S*>(p.kept) + at + i;
          alignas(64) T blended[kTile];
          mix(blended, piece.grad + i, first, n, T(coefficients.a), T(coefficients.b));
          if (coefficients.c == 0 && coefficients.d == 0) {
            go(weights, static_cast<const T*>(blended));
          } else {
            alignas(64) T stepped[kTile];
            go(stepped, static_cast<const T*>(blended));
            const double rate = piece.flags & kMaximize ? -double(group.lr) : double(group.lr);
            mix(blended, piece.grad + i, first, n, T(rate * coefficients.c),
                T(rate * coefficients.d));
            subtract(weights, from + i, stepped, blended, n, group.lr == T(0));
          }
        } else {
          go(weights, piece.grad + i);
        }
        if (streams) stream(piece.weights + i, tile, n);
      }
    });
  });
  if (p.stream) end_streaming();
}

}  // namespace

#define FUSED_SAM_STRING_(x) #x
#define FUSED_SAM_STRING(x) FUSED_SAM_STRING_(x)

#define FUSED_SAM_ALL_DTYPES(kernel, what) \
  {kernel<what, float>, kernel<what, double>, kernel<what, BFloat16>, kernel<what, Float16>},
#define FUSED_SAM_REDUCE(sums) FUSED_SAM_ALL_DTYPES(reduce, sums)
#define FUSED_SAM_ASCEND(ascent) FUSED_SAM_ALL_DTYPES(ascend_, ascent)
#define FUSED_SAM_UPDATE(rule) FUSED_SAM_ALL_DTYPES(update_, rule)

extern const Kernels kKernels;
const Kernels kKernels = {
    FUSED_SAM_STRING(FUSED_SAM_ISA),
    {FUSED_SAM_SUMS(FUSED_SAM_REDUCE)},
    {FUSED_SAM_ASCENTS(FUSED_SAM_ASCEND)},
    {FUSED_SAM_RULES(FUSED_SAM_UPDATE)},
    {restore_<float>, restore_<double>, restore_<BFloat16>, restore_<Float16>},
};

}  // namespace FUSED_SAM_ISA
}  // namespace fused_sam
