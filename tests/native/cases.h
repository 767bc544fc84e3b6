// Cases for the kernels of either device, and what must come out of them by the textbook, in
// float64. Every buffer is an allocation of its own of the exact size, so that AddressSanitizer
// sees the first element read or written beyond it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../csrc/mathematics.h"
#include "../../csrc/storage.h"
#include "../../csrc/tables.h"

namespace cases {

using namespace fused_sam;

inline int failures = 0;

#define EXPECT(condition, ...)                                             \
  do {                                                                     \
    if (!(condition) && ++cases::failures <= 20) {                         \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fprintf(stderr, "\n");                                          \
    }                                                                      \
  } while (0)

template <typename S>
constexpr Dtype kDtype = Dtype::kFloat32;
template <>
inline constexpr Dtype kDtype<double> = Dtype::kFloat64;
template <>
inline constexpr Dtype kDtype<BFloat16> = Dtype::kBFloat16;
template <>
inline constexpr Dtype kDtype<Float16> = Dtype::kFloat16;

// Half an ulp, relative: of the storage type and of the compute type.
template <typename S>
constexpr double kRound = 0x1p-24;
template <>
inline constexpr double kRound<double> = 0x1p-53;
template <>
inline constexpr double kRound<BFloat16> = 0x1p-8;
template <>
inline constexpr double kRound<Float16> = 0x1p-11;

template <typename S>
double value(S x) {
  return static_cast<double>(load(x));
}

template <typename S>
bool same_bits(S a, S b) {
  return std::memcmp(&a, &b, sizeof(S)) == 0;
}

// The sums and the ascents by their numbers.
#define CASES_ID(value) k##value,
enum class SumsId : int { FUSED_SAM_SUMS(CASES_ID) };
enum class AscentId : int { FUSED_SAM_ASCENTS(CASES_ID) };
#undef CASES_ID

enum class RuleId : int { kSgd, kAdam, kRmsProp };  // as FUSED_SAM_RULES lists them

// A rule with its options, as torch.optim has them; one group.
struct Options {
  RuleId rule;
  int variant;  // SGD: 1 momentum; Adam: 1 amsgrad; RMSprop: 1 momentum, 2 centered
  bool nesterov = false, maximize = false, decoupled = false, adaptive = false;
  double lr = 0.1, weight_decay = 0.05, momentum = 0.9, dampening = 0.25, eps = 1e-3;
  double beta1 = 0.8, beta2 = 0.95, rho = 0.5, eta = 0.01, grad_scale = 1;
  double step = 3;       // the running one
  double alpha = -1;     // GSAM's; negative: no blend, and nothing is kept
  double weight = -1;    // WSAM's; negative: it is not that
  bool looks = false;    // LookSAM: the blend is a direction, and the rule sees the gradient
  bool follows = false;  // a climb along the momentum comes next, of the first group
  double p = 1.5;        // of the p-norm
  AscentId ascent = AscentId::kSam;  // or along an average
  double sigma = 0.75, lam = 0.6;    // Friendly-SAM's
  double theta = 0.3;                // VaSSO's
  bool hides_param = false;          // the bit that asks for the weights is not set

  bool blends() const { return alpha >= 0 || weight >= 0 || looks; }

  bool averages() const { return ascent != AscentId::kSam; }

  // What is reduced before the climb.
  SumsId norm() const {
    if (ascent == AscentId::kFriendlySam) return SumsId::kFriendlySamNorm;
    return averages() ? SumsId::kVassoSamNorm : SumsId::kSamNorm;
  }

  // The blend's number in FUSED_SAM_BLENDS; negative: none.
  int blend() const { return looks ? 3 : weight >= 0 ? 1 : alpha >= 0 ? 0 : -1; }

  // Which states the group keeps, as bits.
  int kept() const {
    if (rule == RuleId::kSgd) return variant & 1;
    if (rule == RuleId::kAdam) return 3 | (variant & 1) << 2;
    return 1 | (variant & 3) << 1;
  }
};

constexpr int kRows = 2;

// What a blend's coefficients are made of: <g, g'>, ||g'||**2, ||g||**2.
constexpr double kNumbers[] = {2, 4, 3};

// The options of each group: the second one differs from the first wherever groups may.
inline Options group_of(const Options& o, int64_t row) {
  Options group = o;
  if (row == 0) return group;
  group.variant ^= 1;
  group.maximize = !o.maximize;
  group.adaptive = !o.adaptive;
  if (o.rule == RuleId::kAdam) group.decoupled = !o.decoupled;
  group.weight_decay = 0.02;
  group.rho = 0.25;
  group.sigma = 0.5;
  group.lam = 0.9;
  group.theta = 0.8;
  group.follows = false;
  return group;
}

// The tables, of every value.
template <typename T>
struct Hyper {
  SamNorm::Columns<T> ascent[kRows];
  PNorm::Columns<T> p_norm[kRows];
  FriendlySam::Columns<T> friendly[kRows];
  VassoSam::Columns<T> vasso[kRows];
  Gsam::Columns<T> gsam[kRows];
  Wsam::Columns<T> wsam[kRows];
  LookSam::Columns<T> looksam[kRows];
  Sgd::Columns<T> sgd[kRows];
  Adam::Columns<T> adam[kRows];
  RmsProp::Columns<T> rmsprop[kRows];
  T decay[kRows];

  explicit Hyper(const Options& options) {
    for (int row = 0; row < kRows; ++row) fill(group_of(options, row), row);
  }

  const void* of_blend(const Options& o) const {
    if (o.looks) return looksam;
    return o.weight >= 0 ? static_cast<const void*>(wsam) : gsam;
  }

  // For the terms of a sum; the climb that comes after it reads the same.
  const void* of(SumsId sums) const {
    if (sums == SumsId::kPNormMax || sums == SumsId::kPNormSum) return p_norm;
    if (sums == SumsId::kFriendlySamNorm) return friendly;
    return sums == SumsId::kVassoSamNorm ? static_cast<const void*>(vasso) : ascent;
  }

  const void* of(RuleId rule) const {
    if (rule == RuleId::kSgd) return sgd;
    return rule == RuleId::kAdam ? static_cast<const void*>(adam) : rmsprop;
  }

 private:
  void fill(const Options& o, int row) {
    const auto log = [](double beta) {
      return T(beta > 0 ? std::log(beta) : -std::numeric_limits<double>::infinity());
    };
    ascent[row] = {T(o.maximize ? -o.rho : o.rho), T(o.adaptive), T(o.eta)};
    p_norm[row] = {ascent[row].rho, T(o.adaptive), T(o.eta), T(1 / (o.p - 1)), T(1 / o.p)};
    const T unscale = T(1 / o.grad_scale);
    friendly[row] = {ascent[row].rho, T(o.adaptive), T(o.eta),    unscale,
                     T(o.sigma),      T(o.lam),      T(1 - o.lam)};
    vasso[row] = {ascent[row].rho, T(o.adaptive), T(o.eta), unscale, T(o.theta), T(1 - o.theta)};
    gsam[row] = {T(o.alpha)};
    wsam[row] = {T(o.weight), std::numeric_limits<T>::infinity()};
    looksam[row] = {T(0.7)};
    decay[row] = T(o.decoupled ? 0 : o.weight_decay);
    const T momentum = T(o.variant & 1 ? o.momentum : 0);
    sgd[row] = {T(o.lr), T(o.weight_decay), momentum, T(1 - o.dampening), T(o.nesterov)};
    adam[row] = {T(o.lr),    T(o.weight_decay), T(o.decoupled), T(1 - o.beta1), log(o.beta1),
                 T(o.beta2), T(1 - o.beta2),    log(o.beta2),   T(o.eps),       T(o.variant & 1)};
    rmsprop[row] = {T(o.lr),  T(o.weight_decay), T(o.beta2),      T(1 - o.beta2),
                    T(o.eps), momentum,          T(o.variant & 2)};
  }
};

// The rules of torch.optim, written from its documentation.
inline double textbook(double w, double g, double (&s)[3], const Options& o, bool fresh) {
  g /= o.grad_scale;
  if (o.maximize) g = -g;
  if (o.decoupled) {
    w *= 1 - o.lr * o.weight_decay;
  } else {
    g += o.weight_decay * w;
  }
  switch (o.rule) {
    case RuleId::kSgd:
      if (o.variant & 1) {
        s[0] = o.momentum * s[0] + (fresh ? 1 : 1 - o.dampening) * g;
        g = o.nesterov ? g + o.momentum * s[0] : s[0];
      }
      return w - o.lr * g;
    case RuleId::kAdam: {
      s[0] = o.beta1 * s[0] + (1 - o.beta1) * g;
      s[1] = o.beta2 * s[1] + (1 - o.beta2) * g * g;
      double v = s[1];
      if (o.variant & 1) v = s[2] = std::max(s[2], v);
      const double v_hat = v / (1 - std::pow(o.beta2, o.step));
      return w - o.lr * s[0] / (1 - std::pow(o.beta1, o.step)) / (std::sqrt(v_hat) + o.eps);
    }
    case RuleId::kRmsProp: {
      s[0] = o.beta2 * s[0] + (1 - o.beta2) * g * g;
      double avg = s[0];
      if (o.variant & 2) {
        s[2] = o.beta2 * s[2] + (1 - o.beta2) * g;
        avg -= s[2] * s[2];
      }
      double update = g / (std::sqrt(avg) + o.eps);
      if (o.variant & 1) update = s[1] = o.momentum * s[1] + update;
      return w - o.lr * update;
    }
  }
  std::abort();
}

// The dtypes of a bucket: weights, gradients, what is saved (the weights, or masters), states.
template <typename W_, typename G_ = W_, typename M_ = W_, typename S_ = M_>
struct Kinds {
  using W = W_;
  using G = G_;
  using M = M_;
  using S = S_;
  using T = typename Compute<W>::Type;
  static constexpr bool kMasters = !std::is_same_v<W, M>;

  static constexpr Types types() {
    return {kDtype<W>, kDtype<G>, kDtype<M>, kDtype<G>, {kDtype<S>, kDtype<S>, kDtype<S>}};
  }
};

constexpr int kPinned = 3;

// The address of a missing gradient: whoever reads there ends the program.
constexpr int64_t kNowhere = 64;

// A bucket: parameters of odd sizes, some without a gradient, some gradients off 16 bytes. The last
// kPinned parameters are pinned: the first of them at an aligned address, the others one element
// off. Of these, one has an aligned gradient, so that nothing but its own address forbids 128-bit
// accesses to it, and one has none, so that it is only returned. Of masters at w every fifth one is
// not that of its weight, which somebody has changed.
template <typename K>
struct Bucket {
  using T = typename K::T;
  using W = typename K::W;
  using G = typename K::G;
  using M = typename K::M;
  using S = typename K::S;

  struct Grad {
    std::unique_ptr<G[]> memory;
    G* data = nullptr;
  };

  std::vector<Slot> slots;
  std::vector<Grad> grads;
  std::vector<int64_t> addresses;
  std::vector<int32_t> flags;
  std::vector<float> step;
  std::unique_ptr<W[]> pinned_memory[kPinned];
  std::vector<void*> pinned;
  W* weights;
  M* saved;
  G* kept;
  T* average;
  T* direction;
  S* states[3];
  int64_t moved = 0, size = 0;

  explicit Bucket(const std::vector<int64_t>& sizes, unsigned seed) : random_(seed) {
    for (size_t i = 0; i < sizes.size(); ++i) {
      slots.push_back({size, sizes[i], static_cast<int64_t>(i / 2 % kRows), 0});  // weights: below
      size += (sizes[i] + 63) / 64 * 64;
      if (i + kPinned < sizes.size()) moved = size;
      Grad grad;
      if (i % 4 != 3) {
        // Off by one element for every third one: no 128-bit access is aligned then.
        const int64_t off = i % 3 == 2;
        grad.memory.reset(new (std::align_val_t(64)) G[sizes[i] + off]);
        grad.data = grad.memory.get() + off;
        fill(grad.data, sizes[i], -1, 1);
      }
      addresses.push_back(grad.data ? reinterpret_cast<int64_t>(grad.data) : kNowhere);
      grads.push_back(std::move(grad));
      flags.push_back((i % 5 != 4 ? kPerturbed : 0) | (i % 2 ? kFresh : 0) |
                      (i % 3 != 1 ? kHeld : 0));
      step.push_back(2.0f);
    }
    weights = flat<W>(moved);
    saved = flat<M>(size);
    kept = flat<G>(size);
    average = flat<T>(size);
    direction = flat<T>(size);
    for (S*& state : states) state = flat<S>(size);
    for (int k = 0; k < kPinned; ++k) {
      const Slot& slot = slots[num_moved() + k];
      const int64_t off = k > 0;
      pinned_memory[k].reset(new (std::align_val_t(64)) W[slot.numel + off]);
      pinned.push_back(pinned_memory[k].get() + off);
    }
    for (size_t i = 0; i < slots.size(); ++i) {
      Slot& slot = slots[i];
      slot.weights = reinterpret_cast<int64_t>(weights_of(i));
      const bool aligned = slot.weights % 16 == 0 && addresses[i] % 16 == 0;
      flags[i] |= (has_grad(i) ? 0 : kMissing) | (aligned ? kAligned : 0);
      fill(weights_of(i), slot.numel, -2, 2);
      fill(saved + slot.start, slot.numel, -2, 2);
      if constexpr (K::kMasters) {
        for (int64_t k = 0; !(flags[i] & kPerturbed) && k < slot.numel; ++k) {
          if (k % 5) weights_of(i)[k] = round_to<W>(saved[slot.start + k]);
        }
      }
      fill(kept + slot.start, slot.numel, -1, 1);
      fill(average + slot.start, slot.numel, -1, 1);
      for (int64_t k = i % 3; k < slot.numel; k += 3) average[slot.start + k] = T(NAN);  // none yet
      fill(direction + slot.start, slot.numel, -1, 1);
      fill(states[0] + slot.start, slot.numel, 0.5, 1);
      fill(states[1] + slot.start, slot.numel, 0.5, 1);
      fill(states[2] + slot.start, slot.numel, -0.5, 0.5);
    }
  }

  Bucket(const Bucket&) = delete;

  ~Bucket() {
    for (void* buffer :
         {static_cast<void*>(weights), static_cast<void*>(saved), static_cast<void*>(kept)}) {
      std::free(buffer);
    }
    std::free(average);
    std::free(direction);
    for (S* state : states) std::free(state);
    for (auto& memory : pinned_memory) release(memory);
    for (Grad& grad : grads) release(grad.memory);
  }

  int num_moved() const { return static_cast<int>(slots.size()) - kPinned; }

  W* weights_of(size_t i) {
    return static_cast<int>(i) < num_moved() ? weights + slots[i].start
                                             : static_cast<W*>(pinned[i - num_moved()]);
  }

  bool has_grad(size_t i) const { return grads[i].data != nullptr; }

  // The bits of each slot with those of a group.
  std::vector<int32_t> bits(const Options& o) const {
    std::vector<int32_t> all = flags;
    for (size_t i = 0; i < all.size(); ++i) {
      const Options group = group_of(o, slots[i].row);
      all[i] |= (group.maximize ? kMaximize : 0) |
                (group.adaptive && !group.hides_param ? kReadsParam : 0) |
                (group.blends() ? kBlends : 0) | (group.follows ? kSummed | kStays : 0) |
                group.kept() << kKeptShift;
    }
    return all;
  }

  // The states that some group keeps; null for the others.
  void give_states(void* (&to)[3], const Options& o) const {
    const int kept = group_of(o, 0).kept() | group_of(o, 1).kept();
    for (int k = 0; k < 3; ++k) to[k] = kept & 1 << k ? states[k] : nullptr;
  }

  // All weights, saved weights and states, to compare with later.
  struct Copy {
    std::vector<std::vector<W>> weights;
    std::vector<M> saved;
    std::vector<G> kept;
    std::vector<T> average;
    std::vector<T> direction;
    std::vector<S> states[3];
    std::vector<float> step;

    // The weight at w, as precisely as the bucket knows it.
    M at_w(size_t slot, int64_t k, int64_t at, bool away) const {
      if constexpr (K::kMasters) {
        const W w = weights[slot][k];
        return away || same_bits(round_to<W>(saved[at]), w) ? saved[at] : M(load(w));
      } else {
        return away ? saved[at] : weights[slot][k];
      }
    }
  };

  Copy copy() {
    Copy c;
    for (size_t i = 0; i < slots.size(); ++i) {
      c.weights.emplace_back(weights_of(i), weights_of(i) + slots[i].numel);
    }
    c.saved.assign(saved, saved + size);
    c.kept.assign(kept, kept + size);
    c.average.assign(average, average + size);
    c.direction.assign(direction, direction + size);
    for (int k = 0; k < 3; ++k) c.states[k].assign(states[k], states[k] + size);
    c.step = step;
    return c;
  }

  // What lies between the parameters is zero, and stays so.
  void expect_padding() {
    for (size_t i = 0; i < slots.size(); ++i) {
      const int64_t end = slots[i].start + slots[i].numel;
      const int64_t next = i + 1 < slots.size() ? slots[i + 1].start : size;
      for (int64_t at = end; at < next; ++at) {
        EXPECT(same_bits(saved[at], M()), "padding of saved at %ld", long(at));
        EXPECT(same_bits(kept[at], G()), "padding of kept at %ld", long(at));
        EXPECT(same_bits(average[at], T()), "padding of the average at %ld", long(at));
        EXPECT(same_bits(direction[at], T()), "padding of the direction at %ld", long(at));
        for (S* state : states) EXPECT(same_bits(state[at], S()), "padding of a state");
        if (at < moved) EXPECT(same_bits(weights[at], W()), "padding of the weights");
      }
    }
  }

  template <typename X>
  void fill(X* to, int64_t n, double low, double high) {
    std::uniform_real_distribution<double> distribution(low, high);
    for (int64_t i = 0; i < n; ++i) {
      to[i] = round_to<X>(typename Compute<X>::Type(distribution(random_)));
    }
  }

 private:
  template <typename X>
  static X* flat(int64_t n) {
    X* buffer = static_cast<X*>(std::aligned_alloc(64, (n * sizeof(X) + 63) / 64 * 64 + !n * 64));
    std::memset(static_cast<void*>(buffer), 0, n * sizeof(X));
    return buffer;
  }

  template <typename X>
  static void release(std::unique_ptr<X[]>& memory) {
    ::operator delete[](memory.release(), std::align_val_t(64));
  }

  std::mt19937 random_;
};

// ------------------------------------------------------------------------------------------ checks

// What a climb follows, which average it leaves, and the size of the terms that either is a sum of.
struct Followed {
  double direction, average, size;
};

// average: NaN if there is none yet.
inline Followed followed(double grad, double average, const Options& o) {
  if (!o.averages()) return {grad, average, 0};
  const double g = grad / o.grad_scale, m = average, size = std::fabs(g) + std::fabs(m);
  if (std::isnan(m)) return {g, g, std::fabs(g)};
  if (o.ascent == AscentId::kFriendlySam) {
    return {g - o.sigma * m, o.lam * m + (1 - o.lam) * g, size};
  }
  const double next = (1 - o.theta) * m + o.theta * g;
  return {next, next, size};
}

// Roundings of a direction or of an average: unscale, the factor, two products, the sum.
constexpr double kFollows = 5;

// plain: without the weights, whatever the groups say. slack: gets what the roundings of directions
// along an average can make of it.
template <typename K>
double sq_norm_of(Bucket<K>& bucket, const Options& options, bool plain, double* slack = nullptr) {
  long double sum = 0, spread = 0;  // their own rounding must not count for float64
  for (size_t i = 0; i < bucket.slots.size(); ++i) {
    if (!bucket.has_grad(i)) continue;
    const Options o = group_of(options, bucket.slots[i].row);
    for (int64_t k = 0; k < bucket.slots[i].numel; ++k) {
      const double t = o.adaptive && !plain ? std::fabs(value(bucket.weights_of(i)[k])) + o.eta : 1;
      const double m = static_cast<double>(bucket.average[bucket.slots[i].start + k]);
      const Followed along = followed(value(bucket.grads[i].data[k]), m, o);
      const double x = t * along.direction, error = t * kFollows * along.size;
      sum += static_cast<long double>(x) * x;
      spread += static_cast<long double>(2 * std::fabs(x)) * error;
    }
  }
  if (slack) *slack = static_cast<double>(spread) * kRound<typename K::T> * 1.001;
  return static_cast<double>(sum);
}

template <typename T>
void expect_sq_norm(double got, double want, double slack = 0) {
  // Each term has 4 roundings and takes part in at most 16 additions in the compute type.
  EXPECT(std::fabs(got - want) <= 20 * 2 * kRound<T> * want + slack,
         "squared norm %.9g, expected %.9g", got, want);
}

// The climb whose number the runners give.
constexpr uint32_t kNumber = 7;

inline uint32_t scrambled(uint32_t x) {
  for (const auto& [shift, factor] : {std::pair(16, 0x7feb352dull), std::pair(15, 0x846ca68bull)}) {
    x = static_cast<uint32_t>((x ^ x >> shift) * factor);
  }
  return x ^ x >> 16;
}

// Whether `now` is the neighbour of `want` that the hash of the element's offset and the climb's
// number chooses. want is known to within `bound`, which may leave the choice open.
template <typename S>
bool is_chosen(S now, double want, double bound, int64_t at) {
  if (want == 0) return value(now) == 0;
  const uint32_t noise = scrambled(static_cast<uint32_t>(at) ^ scrambled(kNumber));
  const bool wide = kRound<S> == 0x1p-8;  // bfloat16
  const bool small = !wide && std::fabs(want) < 0x1p-14;
  const double unit = small ? 0x1p-24 : std::ldexp(2 * kRound<S>, std::ilogb(want));
  const double chance = wide    ? (noise >> 16) * 0x1p-16
                        : small ? (noise >> 11) * 0x1p-21
                                : (noise >> 19) * 0x1p-13;
  const double whole = std::floor(std::fabs(want) / unit);
  const double rest = std::fabs(want) / unit - whole + chance - 1;
  const double got = std::fabs(value(now)) / unit - whole;
  if (std::fabs(rest) <= bound / unit) return got == 0 || got == 1;
  if (whole == 0 && got == 0) return rest < 0;
  return got == (rest > 0 ? 1 : 0) && std::signbit(value(now)) == std::signbit(want);
}

// What the sums of the p-norm and of a blend come to; `largest` is what the p-norm's sum is given.
struct Sums {
  double largest = 0;
  long double shares = 0, gram[3] = {};  // their own rounding must not count for float64
};

template <typename K>
Sums sums_of(Bucket<K>& bucket, const Options& options) {
  Sums sums;
  const auto scaled = [&](size_t i, int64_t k) {
    const Options o = group_of(options, bucket.slots[i].row);
    const double t = o.adaptive ? std::fabs(value(bucket.weights_of(i)[k])) + o.eta : 1;
    return std::fabs(t * value(bucket.grads[i].data[k]));
  };
  for (bool second : {false, true}) {
    for (size_t i = 0; i < bucket.slots.size(); ++i) {
      if (!bucket.has_grad(i)) continue;
      for (int64_t k = 0; k < bucket.slots[i].numel; ++k) {
        const double q = options.p / (options.p - 1), g = value(bucket.grads[i].data[k]);
        const bool held = bucket.flags[i] & kHeld;
        const double first = held ? value(bucket.kept[bucket.slots[i].start + k]) : 0;
        if (!second) {
          sums.largest = std::max(sums.largest, scaled(i, k));
          sums.gram[0] += static_cast<long double>(first) * g;
          sums.gram[1] += static_cast<long double>(g) * g;
          sums.gram[2] += static_cast<long double>(first) * first;
        } else {
          sums.shares += std::pow(scaled(i, k) / sums.largest, q);
        }
      }
    }
  }
  return sums;
}

// A weight at w, as it is without a climb.
template <typename K>
auto as_weight(typename K::M w) {
  if constexpr (K::kMasters) {
    return round_to<typename K::W>(w);
  } else {
    return w;
  }
}

// sq_norm: what the kernel was given. 0 or not finite: w is saved and nothing moves. Perturbed
// slots have their w in `saved` already.
template <typename K>
void expect_perturbed(Bucket<K>& bucket, const typename Bucket<K>::Copy& before,
                      const Options& options, double sq_norm) {
  using W = typename K::W;
  using T = typename K::T;
  const double norm = std::sqrt(sq_norm);
  const bool moves = std::isfinite(norm) && norm > 0;
  for (size_t i = 0; i < bucket.slots.size(); ++i) {
    const Slot& slot = bucket.slots[i];
    const Options o = group_of(options, slot.row);
    for (int64_t k = 0; k < slot.numel; ++k) {
      const W old = before.weights[i][k], now = bucket.weights_of(i)[k];
      const auto saved = bucket.saved[slot.start + k];
      if (!bucket.has_grad(i)) {
        EXPECT(same_bits(saved, before.saved[slot.start + k]), "saved without a gradient");
        EXPECT(same_bits(now, old), "moved without a gradient");
        EXPECT(same_bits(bucket.average[slot.start + k], before.average[slot.start + k]),
               "an average without a gradient");
        continue;
      }
      const bool away = bucket.flags[i] & kPerturbed;
      const auto w = before.at_w(i, k, slot.start + k, away);
      EXPECT(same_bits(saved, w), "slot %zu, element %ld was not saved", i, long(k));
      const auto kept = o.blends() ? bucket.grads[i].data[k] : before.kept[slot.start + k];
      EXPECT(same_bits(bucket.kept[slot.start + k], kept), "slot %zu, element %ld: kept", i,
             long(k));
      const double grad = value(bucket.grads[i].data[k]);
      const T average = bucket.average[slot.start + k], last = before.average[slot.start + k];
      const Followed along = followed(grad, static_cast<double>(last), o);
      if (o.averages() && std::isfinite(norm)) {  // though it need not move
        EXPECT(std::fabs(average - along.average) <= kFollows * kRound<T> * along.size * 1.001,
               "slot %zu, element %ld: average %.9g, expected %.9g", i, long(k), double(average),
               along.average);
      } else {
        EXPECT(same_bits(average, last), "slot %zu, element %ld: another average", i, long(k));
      }
      if (!moves) {
        EXPECT(same_bits(now, away ? as_weight<K>(w) : old), "moved with norm %g", norm);
        continue;
      }
      const double t = o.adaptive ? std::fabs(value(w)) + o.eta : 1;
      const double scale = (o.maximize ? -o.rho : o.rho) / norm * t * t;
      const double climb = scale * along.direction;
      // rho / norm, t, t * t, * g, * scale: 8 roundings of the climb, one of the sum, one stored.
      const double want = value(w) + climb;
      const double bound = kRound<T> * (8 * std::fabs(climb) + 2 * std::fabs(want) +
                                        kFollows * std::fabs(scale) * along.size);
      if constexpr (sizeof(W) == 2) {
        EXPECT(is_chosen(now, want, bound, slot.start + k),
               "slot %zu, element %ld: %.9g is not the neighbour of %.9g to be chosen", i, long(k),
               value(now), want);
      } else {
        EXPECT(std::fabs(value(now) - want) <= (kRound<W> * std::fabs(want) + bound) * 1.001,
               "slot %zu, element %ld: %.9g, expected %.9g", i, long(k), value(now), want);
      }
    }
  }
  bucket.expect_padding();
}

// What is where the weights at w are in full: the masters, or the weights.
template <typename K>
auto home_of(Bucket<K>& bucket, size_t slot, int64_t k) {
  if constexpr (K::kMasters) {
    return bucket.saved[bucket.slots[slot].start + k];
  } else {
    return bucket.weights_of(slot)[k];
  }
}

// total: of the squares of the momentum, where a climb along it comes next.
template <typename K>
void expect_updated(Bucket<K>& bucket, const typename Bucket<K>::Copy& before,
                    const Options& options, bool skip, double total = 0) {
  using W = typename K::W;
  using M = typename K::M;
  using S = typename K::S;
  using T = typename K::T;
  long double squares = 0;  // its own rounding must not count for float64
  for (size_t i = 0; i < bucket.slots.size(); ++i) {
    const Slot& slot = bucket.slots[i];
    const Options o = group_of(options, slot.row);
    const bool perturbed = bucket.flags[i] & kPerturbed, steps = bucket.has_grad(i) && !skip;
    const bool stays = o.follows && perturbed && bucket.has_grad(i);
    if (o.rule != RuleId::kSgd) {
      EXPECT(bucket.step[i] == before.step[i] + (steps ? 1 : 0), "step of slot %zu", i);
    }
    for (int64_t k = 0; k < slot.numel; ++k) {
      const int64_t at = slot.start + k;
      const bool touched = perturbed || steps;
      const M w = before.at_w(i, k, at, perturbed || (K::kMasters && !steps));
      const M now = stays ? bucket.saved[at] : home_of(bucket, i, k);
      const double v = o.follows && bucket.has_grad(i) ? value(bucket.states[0][at]) : 0;
      squares += static_cast<long double>(v) * v;
      if (stays) {
        EXPECT(same_bits(bucket.weights_of(i)[k], before.weights[i][k]),
               "slot %zu, element %ld did not stay", i, long(k));
      } else if constexpr (K::kMasters) {
        const W weight = bucket.weights_of(i)[k];
        EXPECT(same_bits(weight, touched ? round_to<W>(now) : before.weights[i][k]),
               "slot %zu, element %ld is not its master", i, long(k));
      }
      if (!(K::kMasters || stays) || !steps) {
        EXPECT(same_bits(bucket.saved[at], before.saved[at]), "update_ wrote to saved");
      }
      double s[3];
      for (int m = 0; m < 3; ++m) s[m] = value(before.states[m][at]);
      const double old[3] = {s[0], s[1], s[2]};
      double want = value(w);
      if (steps) {
        double g = value(bucket.grads[i].data[k]);
        const double first = bucket.flags[i] & kHeld ? value(before.kept[at]) : 0;
        double after = 0;
        if (o.looks) {
          const double c = kNumbers[0] / kNumbers[2], across = g - c * first;
          EXPECT(std::fabs(value(bucket.direction[at]) - across) <= 4 * kRound<T> * 2 * 1.001,
                 "slot %zu, element %ld: direction %.9g, expected %.9g", i, long(k),
                 value(bucket.direction[at]), across);
        } else if (o.weight >= 0) {
          after = o.lr * (o.maximize ? -1 : 1) * o.weight * (g - first) / o.grad_scale;
          g = first;
        } else if (o.alpha >= 0) {
          const double c = kNumbers[0] / kNumbers[1];
          g = (1 + o.alpha * c) * g - o.alpha * first;
        }
        if (options.follows && perturbed && !o.decoupled) {
          const double decay = o.weight_decay * (value(before.weights[i][k]) - value(w));
          g += (o.maximize ? -1 : 1) * o.grad_scale * decay;
        }
        want = textbook(value(w), g, s, o, bucket.flags[i] & kFresh) - after;
      }
      if (!steps || !o.looks) {
        EXPECT(same_bits(bucket.direction[at], before.direction[at]), "another direction");
      }
      for (int m = 0; m < 3; ++m) {
        // At most 6 roundings on terms no larger than 4: what the data above allow.
        const bool untouched = s[m] == old[m];
        const double bound = kRound<S> * std::fabs(s[m]) + 6 * kRound<T> * 4;
        EXPECT(untouched ? same_bits(bucket.states[m][at], before.states[m][at])
                         : std::fabs(value(bucket.states[m][at]) - s[m]) <= bound * 1.001,
               "slot %zu, element %ld, state %d: %.9g, expected %.9g", i, long(k), m,
               value(bucket.states[m][at]), s[m]);
      }
      if (!steps || o.lr == 0) {
        EXPECT(same_bits(now, w), "slot %zu, element %ld was not returned", i, long(k));
        continue;
      }
      // At most 24 roundings, on terms no larger than |w| + 4 * lr / sqrt(0.2).
      const double bound =
          kRound<M> * std::fabs(want) + 24 * kRound<T> * (std::fabs(want) + 9 * o.lr);
      EXPECT(std::fabs(value(now) - want) <= bound * 1.001,
             "rule %d/%d, slot %zu, element %ld: %.9g, expected %.9g", int(o.rule), o.variant, i,
             long(k), value(now), want);
    }
  }
  expect_sq_norm<T>(total, static_cast<double>(squares));
  bucket.expect_padding();
}

inline std::vector<Options> all_options() {
  std::vector<Options> all;
  for (int variant = 0; variant < 2; ++variant) {
    for (bool flip : {false, true}) {
      Options sgd{RuleId::kSgd, variant};
      sgd.nesterov = sgd.maximize = sgd.adaptive = flip;
      sgd.grad_scale = flip ? 1024 : 1;
      all.push_back(sgd);
      Options adam{RuleId::kAdam, variant};
      adam.decoupled = adam.maximize = adam.adaptive = flip;
      adam.beta1 = flip ? 0 : adam.beta1;
      adam.grad_scale = flip ? 0.75 : 1;
      all.push_back(adam);
    }
  }
  for (int variant = 0; variant < 4; ++variant) {
    Options rmsprop{RuleId::kRmsProp, variant};
    rmsprop.maximize = variant & 1;
    rmsprop.grad_scale = 3;
    all.push_back(rmsprop);
  }
  const Options of_each[] = {all[0], all[3], all[all.size() - 1]};  // of each rule
  for (Options blended : of_each) {
    blended.alpha = 0.3;
    all.push_back(blended);
    blended.weight = 0.7;
    all.push_back(blended);
    blended.looks = true;
    all.push_back(blended);
  }
  for (Options ahead : {all[4], all[6], all[5], all[7]}) {  // SGD with momentum, Adam
    ahead.follows = true;
    all.push_back(ahead);
  }
  return all;
}

template <typename K, typename R>
void run_sums(R& runner, Bucket<K>& bucket, const Options& options) {
  using G = typename K::G;
  using T = typename K::T;
  const Sums want = sums_of(bucket, options);
  const auto check = [&](double got, double exact, double terms, double round) {
    EXPECT(std::fabs(got - exact) <= 40 * 2 * round * terms, "%.17g, expected %.17g", got, exact);
  };
  const double largest = runner.reduce(bucket, options, SumsId::kPNormMax)[0];
  check(largest, want.largest, want.largest, kRound<T>);
  const double shares = runner.reduce(bucket, options, SumsId::kPNormSum, &largest)[0];
  check(shares, want.shares, want.shares, kRound<T>);
  const auto gram = runner.reduce(bucket, options, SumsId::kGram);
  // In float64 whatever the bucket: products are exact, or nearly so.
  const double terms = want.gram[1] + want.gram[2];
  for (int i = 0; i < 3; ++i) check(gram[i], want.gram[i], 10 * terms, 0x1p-53);
  // A maximum keeps NaN, wherever it is.
  for (size_t i = 0; i < bucket.slots.size(); ++i) {
    if (!bucket.has_grad(i) || !bucket.slots[i].numel) continue;
    G& last = bucket.grads[i].data[bucket.slots[i].numel - 1];
    const G old = last;
    last = round_to<G>(T(std::nan("")));
    EXPECT(std::isnan(runner.reduce(bucket, options, SumsId::kPNormMax)[0]), "NaN of slot %zu", i);
    last = old;
  }
}

// Climbs along an average: what they reduce, where they go, and the averages they leave.
template <typename K, typename R>
void run_averages(R& runner, const std::vector<int64_t>& sizes, const Options& options) {
  using T = typename K::T;
  constexpr double kInf = std::numeric_limits<double>::infinity();
  for (AscentId ascent : {AscentId::kFriendlySam, AscentId::kVassoSam}) {
    Options o = options;
    o.ascent = ascent;
    for (double total : {9.0, 0.0, kInf, std::nan("")}) {
      Bucket<K> bucket(sizes, 2);
      const auto before = bucket.copy();
      if (total > 0 && total < kInf) {
        double slack = 0;
        const double want = sq_norm_of(bucket, o, false, &slack);
        expect_sq_norm<T>(runner.reduce(bucket, o, o.norm())[0], want, slack);
      }
      runner.ascend_(bucket, o, total);
      expect_perturbed(bucket, before, o, total);
    }
  }
}

// Runner<K>: kDirects, whether it leaves directions; reduce(bucket, options, SumsId, earlier) ->
// vector of double, ascend_(bucket, options, total), update_(bucket, options, skip) -> sum of the
// squares of the momentum, restore_(bucket, options).
template <typename K, template <typename> class Runner>
void run_all(const std::vector<int64_t>& sizes) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  using T = typename K::T;
  Runner<K> runner;
  const std::vector<Options> all = all_options();
  Options blended = all[3];  // adaptive, and with a loss scale
  blended.alpha = 0.3;
  for (const Options& options : {all[0], blended}) run_averages<K>(runner, sizes, options);
  for (const Options& options : all) {
    if (options.looks && !Runner<K>::kDirects) continue;
    {
      Bucket<K> bucket(sizes, 1);
      const auto before = bucket.copy();
      const double plain = sq_norm_of(bucket, options, true);
      expect_sq_norm<T>(runner.reduce(bucket, options, SumsId::kSquares)[0], plain);
      expect_sq_norm<T>(runner.reduce(bucket, options, SumsId::kSamNorm)[0],
                        sq_norm_of(bucket, options, false));
      if (&options == &all[0] || options.adaptive) run_sums(runner, bucket, options);
      // The bit of a slot decides whether its weights are read, not the columns of its group.
      Options hidden = options;
      hidden.hides_param = true;
      expect_sq_norm<T>(runner.reduce(bucket, hidden, SumsId::kSamNorm)[0], plain);
      runner.ascend_(bucket, options, 9.0);
      expect_perturbed(bucket, before, options, 9.0);
    }
    for (bool skip : {false, true}) {
      Bucket<K> bucket(sizes, 3);
      const auto before = bucket.copy();
      const double total = runner.update_(bucket, options, skip);
      expect_updated(bucket, before, options, skip, total);
    }
    {
      Bucket<K> bucket(sizes, 6);
      const auto before = bucket.copy();
      runner.restore_(bucket, options);
      Options returns = options;
      returns.follows = false;
      expect_updated(bucket, before, returns, true);
    }
    for (double bad : {0.0, kInf, std::nan("")}) {
      Bucket<K> bucket(sizes, 4);
      const auto before = bucket.copy();
      runner.ascend_(bucket, options, bad);
      expect_perturbed(bucket, before, options, bad);
    }
    {
      // With lr 0 the saved bits come back, whatever the gradients.
      Bucket<K> bucket(sizes, 5);
      for (size_t i = 0; i < sizes.size(); ++i) {
        if (!bucket.has_grad(i)) continue;
        for (int64_t k = 0; k < sizes[i]; k += 3) {
          bucket.grads[i].data[k] = round_to<typename K::G>(T(k % 2 ? kInf : std::nan("")));
        }
      }
      const auto before = bucket.copy();
      Options frozen = options;
      frozen.lr = 0;
      runner.update_(bucket, frozen, false);
      for (size_t i = 0; i < sizes.size(); ++i) {
        const bool perturbed = bucket.flags[i] & kPerturbed;
        for (int64_t k = 0; k < sizes[i]; ++k) {
          const int64_t at = bucket.slots[i].start + k;
          const auto w = before.at_w(i, k, at, perturbed);
          const bool follows = group_of(frozen, bucket.slots[i].row).follows;
          const bool stays = follows && perturbed && bucket.has_grad(i);
          const auto now = stays                             ? bucket.saved[at]
                           : perturbed || bucket.has_grad(i) ? home_of(bucket, i, k)
                                                             : w;
          EXPECT(same_bits(now, w), "lr = 0 moved slot %zu", i);
        }
      }
    }
  }
}

template <template <typename> class Runner>
int run_dtypes(const std::vector<int64_t>& sizes) {
  run_all<Kinds<float>, Runner>(sizes);
#if !defined(FLOAT_ONLY)
  run_all<Kinds<double>, Runner>(sizes);
  run_all<Kinds<BFloat16>, Runner>(sizes);
  run_all<Kinds<Float16>, Runner>(sizes);
#if defined(MIXED)
  run_all<Kinds<BFloat16, BFloat16, float>, Runner>(sizes);  // masters
  run_all<Kinds<Float16, float, float>, Runner>(sizes);      // and wide gradients
  run_all<Kinds<BFloat16, float, BFloat16, float>, Runner>(sizes);
  run_all<Kinds<float, Float16>, Runner>(sizes);
#endif
#endif
  std::printf("%d failures\n", failures);
  return failures != 0;
}

}  // namespace cases
