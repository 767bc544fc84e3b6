// The CPU kernels. Compiled once for each instruction set, with FUSED_SAM_ISA its name: the loops
// are plain, and the compiler vectorises them. Nothing here may use inline functions of other
// headers, whose code the linker could share between the instruction sets.
#pragma once

#include "kernels.h"

#include "../mathematics.h"
#include "../storage.h"

#include <cstring>
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

// Elements that are computed at a time: those that have another dtype than the compute type, or are
// streamed, wait in L1.
constexpr int64_t kTile = 512;

// Lanes of the partial sums: a multiple of every vector length, so that all give the same bits.
constexpr int kLanes = 64;

// Additions in the compute type before a lane goes into its float64 sum: bounds the rounding.
constexpr int kRun = 16;

// Memory of a dtype that is known at run time only; offsets count elements.
struct Memory {
  char* at;
  Dtype dtype;

  FUSED_SAM_INLINE Memory(const void* memory, Dtype of)
      : at(static_cast<char*>(const_cast<void*>(memory))), dtype(of) {}

  FUSED_SAM_INLINE Memory operator+(int64_t elements) const {
    return {at + bytes(elements), dtype};
  }

  FUSED_SAM_INLINE int64_t bytes(int64_t elements) const { return elements * size_of(dtype); }

  template <typename S>
  FUSED_SAM_INLINE bool is() const {
    return dtype == DtypeOf<S>::kValue;
  }

  template <typename S>
  FUSED_SAM_INLINE S* as() const {
    return reinterpret_cast<S*>(at);
  }
};

// The part of a slot that a span has.
struct Piece {
  const Slot* slot;
  int64_t index;  // of the slot
  int32_t flags;
  int64_t at;  // of the first element in the flat buffers
  int64_t numel;
  Memory weights;
  Memory grad;  // at null where there is none
};

// Calls f(piece) for each part of a slot that lies in the elements [begin, end).
template <typename F>
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
    const Memory weights(reinterpret_cast<const void*>(slot.weights), p.types.weights);
    Memory grad(nullptr, p.types.grads);
    if (p.grads && !(p.flags[i] & kMissing)) {
      grad = Memory(reinterpret_cast<const void*>(p.grads[i]), p.types.grads) + first;
    }
    f(Piece{&slot, i, p.flags[i], slot.start + first, stop - first, weights + first, grad});
  }
}

FUSED_SAM_INLINE Memory saved_of(const Problem& p, const Piece& piece) {
  return Memory(p.saved, p.types.saved) + piece.at;
}

FUSED_SAM_INLINE Memory kept_of(const Problem& p, const Piece& piece) {
  return Memory(p.kept, p.types.kept) + piece.at;
}

template <typename T>
FUSED_SAM_INLINE T* average_of(const Problem& p, const Piece& piece) {
  return static_cast<T*>(p.average) + piece.at;
}

FUSED_SAM_INLINE bool has_masters(const Problem& p) { return p.types.saved != p.types.weights; }

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

constexpr int64_t kLine = 64;

#if defined(__SSE2__)
// kStreams: without reading the target into the caches first; it is aligned then.
template <bool kStreams>
FUSED_SAM_INLINE void copy_line(char* to, const char* from) {
#if defined(__AVX512F__)
  const __m512i line = _mm512_loadu_si512(from);
  kStreams ? _mm512_stream_si512(reinterpret_cast<__m512i*>(to), line)
           : _mm512_storeu_si512(to, line);
#elif defined(__AVX__)
  for (int k = 0; k < 64; k += 32) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + k));
    __m256i* target = reinterpret_cast<__m256i*>(to + k);
    kStreams ? _mm256_stream_si256(target, half) : _mm256_storeu_si256(target, half);
  }
#else
  for (int k = 0; k < 64; k += 16) {
    const __m128i quarter = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k));
    __m128i* target = reinterpret_cast<__m128i*>(to + k);
    kStreams ? _mm_stream_si128(target, quarter) : _mm_storeu_si128(target, quarter);
  }
#endif
}
#endif

// By lines: the start of memcpy costs a fourth of the time that a tile takes.
template <bool kStreams>
FUSED_SAM_INLINE void copy_bytes(char* to, const char* from, int64_t bytes) {
  int64_t done = 0;
#if defined(__SSE2__)
  if (!kStreams || reinterpret_cast<uintptr_t>(to) % kLine == 0) {
    for (; done + kLine <= bytes; done += kLine) copy_line<kStreams>(to + done, from + done);
  }
#endif
  memcpy(to + done, from + done, bytes - done);
}

// Of one dtype.
FUSED_SAM_NOINLINE void copy(Memory to, Memory from, int64_t n, bool streams) {
  if (streams) {
    copy_bytes<true>(to.at, from.at, to.bytes(n));
  } else {
    copy_bytes<false>(to.at, from.at, to.bytes(n));
  }
}

// Asks for memory that a pass will read soon. The hardware's own prefetching stops at a page's end,
// which a pass that only reads is fast enough to feel.
constexpr int64_t kAhead = 8192;

FUSED_SAM_INLINE void prefetch(const void* memory, int64_t bytes) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < bytes; i += kLine) {
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

// ---------------------------------------------------------------------------- loaders and stores
//
// Kernels compute on tiles of the compute type T: on the memory itself where that holds T, else on
// a tile that is filled here and written back here.

template <typename T, typename S>
void widen(const S* from, T* tile, int64_t n) {
  FUSED_SAM_VECTORIZE
  for (int64_t i = 0; i < n; ++i) tile[i] = T(load(from[i]));
}

template <typename T, typename S>
void narrow(S* to, const T* tile, int64_t n) {
  FUSED_SAM_VECTORIZE
  for (int64_t i = 0; i < n; ++i) to[i] = round_to<S>(tile[i]);
}

// Calls f(S()) with the storage type of a dtype.
template <typename F>
FUSED_SAM_INLINE void with_storage(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float());
    case Dtype::kFloat64:
      return f(double());
    case Dtype::kBFloat16:
      return f(BFloat16());
    case Dtype::kFloat16:
      return f(Float16());
  }
}

// Fills a tile. Once for all kernels, as all of this: it costs a call for each tile.
template <typename T>
FUSED_SAM_NOINLINE void fill_tile(Memory from, T* tile, int64_t n) {
  with_storage(from.dtype, [&](auto s) { widen<T, decltype(s)>(from.as<decltype(s)>(), tile, n); });
}

// Writes a tile back.
template <typename T>
FUSED_SAM_NOINLINE void empty_tile(Memory to, const T* tile, int64_t n, bool streams) {
  with_storage(to.dtype, [&](auto s) {
    using S = decltype(s);
    if (!streams) return narrow<T, S>(to.as<S>(), tile, n);
    if constexpr (std::is_same_v<S, T>) {
      return copy_bytes<true>(to.at, reinterpret_cast<const char*>(tile), to.bytes(n));
    }
    alignas(64) S rounded[kTile];
    narrow<T, S>(rounded, tile, n);
    copy_bytes<true>(to.at, reinterpret_cast<const char*>(rounded), to.bytes(n));
  });
}

// n elements as T: where they are, or in `tile`.
template <typename T>
FUSED_SAM_INLINE T* load_tile(Memory from, T* tile, int64_t n) {
  if (from.is<T>()) return from.as<T>();
  fill_tile<T>(from, tile, n);
  return tile;
}

// Where n elements are to be computed that go to `to`: there, or in `tile`.
template <typename T>
FUSED_SAM_INLINE T* place_of(Memory to, T* tile, bool streams) {
  return to.is<T>() && !streams ? to.as<T>() : tile;
}

// Stores what was computed, unless it was computed there.
template <typename T>
FUSED_SAM_INLINE void store_tile(Memory to, const T* tile, int64_t n, bool streams) {
  if (to.as<T>() != tile) empty_tile<T>(to, tile, n, streams);
}

template <typename S>
void narrow_at_random(S* to, const float* tile, int64_t n, int64_t at, uint32_t seed) {
  FUSED_SAM_VECTORIZE
  for (int64_t i = 0; i < n; ++i) {
    to[i] = round_stochastically<S>(tile[i], noise_of(at + i, seed));
  }
}

// Rounds at random where `to` is half precision. at: the offset of the first element in the flat
// buffers.
template <typename T>
FUSED_SAM_NOINLINE void store_at_random(Memory to, const T* tile, int64_t n, int64_t at,
                                        uint32_t seed, bool streams) {
  if constexpr (std::is_same_v<T, float>) {
    if (to.is<BFloat16>()) return narrow_at_random(to.as<BFloat16>(), tile, n, at, seed);
    if (to.is<Float16>()) return narrow_at_random(to.as<Float16>(), tile, n, at, seed);
  }
  store_tile<T>(to, tile, n, streams);
}

template <typename S>
bool current(const S* weights, const float* masters, float* tile, int64_t n) {
  uint32_t changed = 0;
  FUSED_SAM_VECTORIZE
  for (int64_t i = 0; i < n; ++i) {
    const float master = masters[i];
    const uint32_t differs = uint32_t(round_to<S>(master)) ^ uint32_t(weights[i]);
    changed |= differs;
    tile[i] = differs ? load(weights[i]) : master;
  }
  return changed != 0;
}

// The weights at w in full precision: the masters, but for weights that are not their master,
// rounded, bit for bit: those were changed from outside. Returns whether there are any.
template <typename T>
FUSED_SAM_NOINLINE bool load_masters(Memory weights, Memory masters, T* tile, int64_t n) {
  if constexpr (std::is_same_v<T, float>) {
    const float* from = masters.as<float>();
    return weights.is<BFloat16>() ? current(weights.as<BFloat16>(), from, tile, n)
                                  : current(weights.as<Float16>(), from, tile, n);
  } else {
    return false;  // float64 has no masters
  }
}

// ------------------------------------------------------------------------------------------ reduce

template <typename Sums, typename T>
using TermOf = std::conditional_t<Sums::kWide, double, T>;

// Elements that are added up in the compute type.
constexpr int64_t kRunTile = kRun * kLanes;

// What the terms get in the gradient's place.
template <typename Term, typename Average, typename T, typename Group>
FUSED_SAM_INLINE Term direction_of(const T* grad, const T* average, int64_t i, const Group& group) {
  if constexpr (Average::kIs) {
    T direction, unused;
    Average::follow(grad[i], average[i], group, direction, unused);
    return direction;
  } else {
    return Term(grad[i]);
  }
}

// other: the weights, or what is kept of the gradients at w. n <= kRunTile. next: memory that is
// read soon, of `step` bytes for each kLanes elements; or null.
template <typename Sums, bool kReads, typename T>
FUSED_SAM_INLINE void add_terms(double (&sums)[Sums::kCount][kLanes], const T* other, const T* grad,
                                const T* average, int64_t n, const char* next, int64_t step,
                                const typename Sums::template Columns<TermOf<Sums, T>>& group,
                                const typename Sums::template Earlier<TermOf<Sums, T>>& earlier) {
  using Term = TermOf<Sums, T>;
  using Average = typename Sums::Average;
  using words::add;
  constexpr int kCount = Sums::kCount;
  alignas(64) Term run[kCount][kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    if (next) prefetch(next + i / kLanes * step, step);
    FUSED_SAM_VECTORIZE
    for (int lane = 0; lane < kLanes; ++lane) {
      const Term x = kReads ? Term(other[i + lane]) : Term(0);
      Term terms[kCount];
      const Term g = direction_of<Term, Average>(grad, average, i + lane, group);
      Sums::template terms<kReads>(x, g, group, earlier, terms);
      for (int c = 0; c < kCount; ++c) run[c][lane] = add<Sums::kMax>(run[c][lane], terms[c]);
    }
  }
  for (int lane = 0; i < n; ++lane, ++i) {
    const Term x = kReads ? Term(other[i]) : Term(0);
    Term terms[kCount];
    const Term g = direction_of<Term, Average>(grad, average, i, group);
    Sums::template terms<kReads>(x, g, group, earlier, terms);
    for (int c = 0; c < kCount; ++c) run[c][lane] = add<Sums::kMax>(run[c][lane], terms[c]);
  }
  for (int c = 0; c < kCount; ++c) {
    FUSED_SAM_VECTORIZE
    for (int lane = 0; lane < kLanes; ++lane) {
      sums[c][lane] = add<Sums::kMax>(sums[c][lane], double(run[c][lane]));
    }
  }
}

template <typename Sums, bool kReads, typename T>
FUSED_SAM_INLINE void add_piece(double (&sums)[Sums::kCount][kLanes], Memory other, Memory grad,
                                const T* average, int64_t numel,
                                const typename Sums::template Columns<TermOf<Sums, T>>& group,
                                const typename Sums::template Earlier<TermOf<Sums, T>>& earlier) {
  alignas(64) T others[kReads ? kRunTile : 1], grads[kRunTile];
  for (int64_t i = 0; i < numel; i += kRunTile) {
    const int64_t n = numel - i < kRunTile ? numel - i : kRunTile;
    const char* next = (grad + i).at + kAhead;
    const bool there = next + grad.bytes(n) <= grad.at + grad.bytes(numel);
    const T* x = kReads ? load_tile<T>(other + i, others, n) : nullptr;
    const T* g = load_tile<T>(grad + i, grads, n);
    const T* m = Sums::Average::kIs ? average + i : nullptr;
    add_terms<Sums, kReads, T>(sums, x, g, m, n, there ? next : nullptr, grad.bytes(kLanes), group,
                               earlier);
  }
}

// What the lanes come to.
template <typename Sums>
FUSED_SAM_INLINE double sum_of(const double (&lanes)[kLanes]) {
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum = words::add<Sums::kMax>(sum, lanes[lane]);
  return sum;
}

template <typename Sums, typename T>
void reduce(const Problem& p, void* partials, int64_t begin, int64_t end) {
  using Term = TermOf<Sums, T>;
  static_assert(!Sums::kWide || Sums::kColumns == 0, "hyperparameters are in the compute type");
  const auto earlier = Sums::template earlier<Term>(p.earlier);
  for (int64_t span = begin; span < end; ++span) {
    alignas(64) double sums[Sums::kCount][kLanes] = {};
    for_each_piece(p, span * kSpan, (span + 1) * kSpan, [&](const Piece& piece) {
      if (!piece.grad.at) return;
      const auto group = columns_of<Sums, Term>(p, *piece.slot);
      const Memory other = Sums::kReadsKept ? kept_of(p, piece) : piece.weights;
      const T* average = Sums::Average::kIs ? average_of<T>(p, piece) : nullptr;
      if (piece.flags & (Sums::kReadsKept ? kHeld : kReadsParam)) {
        add_piece<Sums, true, T>(sums, other, piece.grad, average, piece.numel, group, earlier);
      } else {
        add_piece<Sums, false, T>(sums, other, piece.grad, average, piece.numel, group, earlier);
      }
    });
    for (int c = 0; c < Sums::kCount; ++c) {
      static_cast<Term*>(partials)[c * num_spans(p.size) + span] = Term(sum_of<Sums>(sums[c]));
    }
  }
}

// ---------------------------------------------------------------------------------------- restore_

FUSED_SAM_NOINLINE void restore(const Problem& p, const Piece& piece) {
  const Memory saved = saved_of(p, piece);
  if (!has_masters(p)) return copy(piece.weights, saved, piece.numel, p.stream);
  for (int64_t i = 0; i < piece.numel; i += kTile) {
    const int64_t n = piece.numel - i < kTile ? piece.numel - i : kTile;
    store_tile<float>(piece.weights + i, (saved + i).as<float>(), n, p.stream);
  }
}

void restore_(const Problem& p, int64_t begin, int64_t end) {
  for_each_piece(p, begin * kSpan, end * kSpan, [&](const Piece& piece) {
    if (piece.flags & kPerturbed) restore(p, piece);
  });
  if (p.stream) end_streaming();
}

// ----------------------------------------------------------------------------------------- ascend_

template <typename Ascent, typename T>
FUSED_SAM_INLINE void climb(T* moved, const T* weights, const T* grad, int64_t n,
                            const typename Ascent::template Scalars<T>& scalars_) {
  const auto scalars = scalars_;
  FUSED_SAM_VECTORIZE
  for (int64_t i = 0; i < n; ++i) moved[i] = Ascent::move(weights[i], grad[i], scalars);
}

// The average takes the gradients in; `direction` may be `grad`.
template <typename Average, typename T, typename Group>
FUSED_SAM_INLINE void follow(T* direction, T* average, const T* grad, int64_t n,
                             const Group& group_) {
  const auto group = group_;
  FUSED_SAM_VECTORIZE
  for (int64_t i = 0; i < n; ++i) {
    T along, next;
    Average::follow(grad[i], average[i], group, along, next);
    direction[i] = along;
    average[i] = next;
  }
}

template <typename Ascent, typename T>
void ascend_(const Problem& p, const double* numbers, int64_t number, int64_t begin, int64_t end) {
  const uint32_t seed = hash(uint32_t(number));
  const bool masters = has_masters(p);
  // Forwards: walking back over what reduce left in the caches upsets the hardware's prefetching
  // and loses more than it finds.
  for_each_piece(p, begin * kSpan, end * kSpan, [&](const Piece& piece) {
    if (!piece.grad.at) return;
    const auto group = columns_of<Ascent, T>(p, *piece.slot);
    const auto scalars = Ascent::scalars(group, numbers);
    const bool is_saved = (piece.flags & kPerturbed) != 0;
    // Streamed where the old weights are not read from there.
    const bool streams = p.stream && is_saved;
    if (is_saved && scalars.scale == T(0)) restore(p, piece);
    alignas(64) T at_w[kTile], moved[kTile], grads[kTile];
    for (int64_t i = 0; i < piece.numel; i += kTile) {
      const int64_t n = piece.numel - i < kTile ? piece.numel - i : kTile;
      const Memory weights = piece.weights + i, saved = saved_of(p, piece) + i;
      const Memory grad = piece.grad + i;
      const T* w = at_w;
      if (is_saved) {
        w = load_tile<T>(saved, at_w, n);
      } else if (!masters) {
        copy(saved, weights, n, p.stream);
        w = load_tile<T>(weights, at_w, n);
      } else if (load_masters<T>(weights, saved, at_w, n)) {
        copy(saved, Memory(at_w, saved.dtype), n, false);
      }
      if (p.kept) copy(kept_of(p, piece) + i, grad, n, p.stream);
      const T* along = nullptr;
      if constexpr (Ascent::Average::kIs) {
        if (!words::is_finite(T(numbers[0]))) continue;  // no climb, and nothing to take in
        const T* g = load_tile<T>(grad, grads, n);
        follow<typename Ascent::Average, T>(grads, average_of<T>(p, piece) + i, g, n, group);
        along = grads;
      }
      // 0 * inf is NaN, and a scale of 0 must move nothing.
      if (scalars.scale == T(0)) continue;
      if constexpr (!Ascent::Average::kIs) along = load_tile<T>(grad, grads, n);
      T* to = place_of<T>(weights, moved, streams);
      climb<Ascent, T>(to, w, along, n, scalars);
      store_at_random<T>(weights, to, n, piece.at + i, seed, streams);
    }
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

// x * grad + y * kept; what has the factor 0 may be anything, and is not read. A loop for each
// case: loads under a mask wait for the memory longer.
template <typename T>
FUSED_SAM_NOINLINE void mix(T* mixed, const T* grad, Memory kept, int64_t n, T x, T y) {
  alignas(64) T tile[kTile];
  const T* first = y == T(0) ? nullptr : load_tile<T>(kept, tile, n);
  if (x != T(0) && y != T(0)) {
    FUSED_SAM_VECTORIZE
    for (int64_t i = 0; i < n; ++i) mixed[i] = x * grad[i] + y * first[i];
  } else if (x != T(0)) {
    FUSED_SAM_VECTORIZE
    for (int64_t i = 0; i < n; ++i) mixed[i] = x * grad[i];
  } else if (y != T(0)) {
    FUSED_SAM_VECTORIZE
    for (int64_t i = 0; i < n; ++i) mixed[i] = T(0) + y * first[i];  // as a sum: no -0.0
  } else {
    memset(mixed, 0, n * sizeof(T));
  }
}

// Adds the decay of weights ahead of w on the way from there to a gradient that points downhill.
template <typename T>
FUSED_SAM_NOINLINE void add_decay(T* decayed, const T* grad, const T* ahead, const T* at_w,
                                  int64_t n, T descent, T decay) {
  FUSED_SAM_VECTORIZE
  for (int64_t i = 0; i < n; ++i) decayed[i] = descent * grad[i] + decay * (ahead[i] - at_w[i]);
}

// What a blend takes away after the rule's step.
template <typename T>
FUSED_SAM_NOINLINE void subtract(T* weights, const T* after, int64_t n) {
  FUSED_SAM_VECTORIZE
  for (int64_t i = 0; i < n; ++i) weights[i] -= after[i];
}

// weights and from may be the same memory.
template <typename Rule, unsigned kKept, typename T>
FUSED_SAM_INLINE void step(T* weights, const T* from, const T* grad, T* const (&states)[kMaxStates],
                           int64_t n, T descent, bool frozen,
                           const typename Rule::template Scalars<T>& scalars_) {
  // Copies: the stores below cannot change them, which the compiler does not know of references.
  const auto scalars = scalars_;
  T* const state0 = states[0];
  T* const state1 = states[1];
  T* const state2 = states[2];
  FUSED_SAM_VECTORIZE
  for (int64_t i = 0; i < n; ++i) {
    T state[kMaxStates] = {};
    if (kKept & 1u) state[0] = state0[i];
    if (kKept & 2u) state[1] = state1[i];
    if (kKept & 4u) state[2] = state2[i];
    const T old = from[i];
    const T updated = Rule::template update<kKept>(old, descent * grad[i], state, scalars);
    if (kKept & 1u) state0[i] = state[0];
    if (kKept & 2u) state1[i] = state[1];
    if (kKept & 4u) state2[i] = state[2];
    // 0 * inf is NaN and -0.0 - -0.0 is 0.0: with lr 0 only a copy gives the bits back.
    weights[i] = frozen ? old : updated;
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

template <typename Rule, typename T>
FUSED_SAM_NOINLINE void update_piece(const Problem& p, const Piece& piece, double grad_scale,
                                     bool skip) {
  const bool away = (piece.flags & kPerturbed) != 0;
  const bool stays = away && piece.grad.at && (piece.flags & kStays);
  if (!piece.grad.at || skip) {
    if (away && !stays) restore(p, piece);
    return;
  }
  const bool masters = has_masters(p);
  T* const direction = static_cast<T*>(p.direction);
  const auto group = columns_of<Rule, T>(p, *piece.slot);
  const T descent = (piece.flags & kMaximize ? T(-1) : T(1)) / T(grad_scale);
  const T decay = p.decay && away ? static_cast<const T*>(p.decay)[piece.slot->row] : T(0);
  const auto scalars =
      Rule::scalars(group, p.step ? T(p.step[piece.index]) : T(1), (piece.flags & kFresh) != 0);
  const Coefficients coefficients = coefficients_of<T>(p, *piece.slot, piece.flags);
  const bool after = coefficients.c != 0 || coefficients.d != 0;
  const double rate = piece.flags & kMaximize ? -double(group.lr) : double(group.lr);
  const bool frozen = group.lr == T(0);
  // Streamed where the old weights were not read from there.
  const bool streams = p.stream && away && !stays && decay == T(0);
  with_kept<Rule>(unsigned(piece.flags) >> kKeptShift & kKeptMask, [&](auto kept) {
    alignas(64) T at_w[kTile], grads[kTile], mixed[kTile], updated[kTile];
    alignas(64) T tiles[kMaxStates][kTile];
    for (int64_t i = 0; i < piece.numel; i += kTile) {
      const int64_t n = piece.numel - i < kTile ? piece.numel - i : kTile;
      const Memory weights = piece.weights + i, saved = saved_of(p, piece) + i;
      // Away from w only the masters are right; at w the weights are looked at, too.
      const T* w = at_w;
      if (masters && !away) {
        load_masters<T>(weights, saved, at_w, n);
      } else {
        w = load_tile<T>(away ? saved : weights, at_w, n);
      }
      const T* const own = load_tile<T>(piece.grad + i, grads, n);
      const T* grad = own;
      if (piece.flags & kBlends) {
        mix<T>(mixed, own, kept_of(p, piece) + i, n, T(coefficients.a), T(coefficients.b));
        if (direction) {
          store_tile<T>(Memory(direction + piece.at + i, DtypeOf<T>::kValue), mixed, n, p.stream);
        } else {
          grad = mixed;
        }
      }
      if (decay != T(0)) {
        add_decay(mixed, grad, load_tile<T>(weights, updated, n), w, n, descent, decay);
        grad = mixed;
      }
      T* states[kMaxStates] = {};
      for (int k = 0; k < kMaxStates; ++k) {
        if (!(kept.value & 1u << k)) continue;
        const Memory state = Memory(p.states[k], p.types.states[k]) + (piece.at + i);
        states[k] = load_tile<T>(state, tiles[k], n);
      }
      const Memory home = masters || stays ? saved : weights;
      const Memory target = stays ? saved : weights;
      T* to = place_of<T>(home, updated, streams && !masters);
      // A comparison of numbers, which vectorises where a bool in memory does not.
      step<Rule, kept.value, T>(to, w, grad, states, n, decay == T(0) ? descent : T(1),
                                group.lr == T(0), scalars);
      if (after && !frozen) {
        mix<T>(mixed, own, kept_of(p, piece) + i, n, T(rate * coefficients.c),
               T(rate * coefficients.d));
        subtract(to, mixed, n);
      }
      for (int k = 0; k < kMaxStates; ++k) {
        if (!(kept.value & 1u << k)) continue;
        store_tile<T>(Memory(p.states[k], p.types.states[k]) + (piece.at + i), states[k], n, false);
      }
      if (!frozen || masters || home.is<T>()) {
        store_tile<T>(target, to, n, streams);
      } else if (away && !stays) {
        copy(weights, saved, n, streams);  // NaN keeps its bits
      }
    }
  });
}

// With `partials` the squares of the momentum are summed, too, a span's while it is in the caches:
// the very bits of a reduction.
template <typename Rule, typename T>
void update_(const Problem& p, double grad_scale, bool skip, void* partials, int64_t begin,
             int64_t end) {
  const auto update = [&](const Piece& piece) {
    update_piece<Rule, T>(p, piece, grad_scale, skip);
  };
  if (!partials) for_each_piece(p, begin * kSpan, end * kSpan, update);
  if constexpr (Rule::kMomentum >= 0) {
    constexpr int kMomentum = Rule::kMomentum;
    for (int64_t span = begin; partials && span < end; ++span) {
      alignas(64) double sums[1][kLanes] = {};
      for_each_piece(p, span * kSpan, (span + 1) * kSpan, [&](const Piece& piece) {
        update(piece);
        if (!piece.grad.at || !(piece.flags & kSummed)) return;
        const Memory momentum = Memory(p.states[kMomentum], p.types.states[kMomentum]) + piece.at;
        add_piece<Squares, false, T>(sums, momentum, momentum, nullptr, piece.numel, {}, {});
      });
      static_cast<T*>(partials)[span] = T(sum_of<Squares>(sums[0]));
    }
  }
  if (p.stream) end_streaming();
}

}  // namespace

#define FUSED_SAM_STRING_(x) #x
#define FUSED_SAM_STRING(x) FUSED_SAM_STRING_(x)

#define FUSED_SAM_COMPUTES(kernel, what) {kernel<what, float>, kernel<what, double>},
#define FUSED_SAM_REDUCE(sums) FUSED_SAM_COMPUTES(reduce, sums)
#define FUSED_SAM_ASCEND(ascent) FUSED_SAM_COMPUTES(ascend_, ascent)
#define FUSED_SAM_UPDATE(rule) FUSED_SAM_COMPUTES(update_, rule)

extern const Kernels kKernels;
const Kernels kKernels = {
    FUSED_SAM_STRING(FUSED_SAM_ISA),
    {FUSED_SAM_SUMS(FUSED_SAM_REDUCE)},
    {FUSED_SAM_ASCENTS(FUSED_SAM_ASCEND)},
    {FUSED_SAM_RULES(FUSED_SAM_UPDATE)},
    restore_,
};

}  // namespace FUSED_SAM_ISA
}  // namespace fused_sam
