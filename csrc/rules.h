// The mathematics, once: the ascent and each base optimizer's rule, on registers. No loads, no
// stores, no launches. Names and order are those of fused_sam/rules.py.
//
// T is the compute type: double for float64 parameters, else float.
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

#if defined(__CUDACC__) || defined(_MSC_VER)
FUSED_SAM_INLINE float square_root(float x) { return sqrtf(x); }
FUSED_SAM_INLINE double square_root(double x) { return sqrt(x); }
FUSED_SAM_INLINE float exp_minus_1(float x) { return expm1f(x); }
FUSED_SAM_INLINE double exp_minus_1(double x) { return expm1(x); }
#else
FUSED_SAM_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
FUSED_SAM_INLINE double square_root(double x) { return __builtin_sqrt(x); }
FUSED_SAM_INLINE float exp_minus_1(float x) { return __builtin_expm1f(x); }
FUSED_SAM_INLINE double exp_minus_1(double x) { return __builtin_expm1(x); }
#endif

template <typename T>
FUSED_SAM_INLINE T absolute(T x) {
  return x < T(0) ? -x : x;
}

template <typename T>
FUSED_SAM_INLINE bool is_finite(T x) {
  return x - x == T(0);
}

// The hyperparameters of one group: a row of the table that fused_sam/backends/native.py fills, in
// this order. Numbers such as 1 - beta are subtracted there in float64 and rounded once.
template <typename T>
struct Hyper {
  T rho;  // negative for a group that maximizes
  T adaptive;
  T eta;
  T maximize;
  T lr;
  T weight_decay;
  T options;  // which of the rule's variants, below
  T eps;
  T momentum;
  T one_minus_dampening;
  T nesterov;
  T decoupled_weight_decay;
  T one_minus_beta1;
  T log_beta1;
  T beta2;  // RMSprop: alpha
  T one_minus_beta2;
  T log_beta2;
};
constexpr int kHyperSize = 17;
static_assert(sizeof(Hyper<float>) == kHyperSize * sizeof(float), "a row of the table");

// What is the same for all elements of one parameter in one step.
template <typename T>
struct Step {
  T descent;               // gradients are multiplied by it: 1 / loss scale, negative to maximize
  T one_minus_dampening;   // SGD: 1 in the first step
  T coupled_weight_decay;  // added to the gradient
  T decay;                 // the weights are multiplied by it (Loshchilov & Hutter 2019)
  T step_size;             // Adam: lr / bias_correction1
  T bias_correction2;
};

// step: the count with the running step; fresh: the state is still zero.
template <typename T>
FUSED_SAM_INLINE Step<T> make_step(const Hyper<T>& group, T grad_scale, T step, bool fresh) {
  Step<T> s;
  s.descent = (group.maximize != T(0) ? T(-1) : T(1)) / grad_scale;
  // The first gradient enters undampened, as torch.optim.SGD has it.
  s.one_minus_dampening = fresh ? T(1) : group.one_minus_dampening;
  const bool decoupled = group.decoupled_weight_decay != T(0);
  s.coupled_weight_decay = decoupled ? T(0) : group.weight_decay;
  s.decay = decoupled ? T(1) - group.lr * group.weight_decay : T(1);
  // 1 - beta**step without cancellation; beta = 0: log is -inf, and the correction 1.
  s.step_size = group.lr / -exp_minus_1(step * group.log_beta1);
  s.bias_correction2 = -exp_minus_1(step * group.log_beta2);
  return s;
}

// ------------------------------------------------------------------------------------------ ascent

// What the norm is taken of: g, or for ASAM T * g with T = |w| + eta (Kwon et al. 2021, eq. 4).
template <typename T>
FUSED_SAM_INLINE T ascent_dual(T param, T grad, bool adaptive, T eta) {
  return adaptive ? (absolute(param) + eta) * grad : grad;
}

// scale = rho / norm: w + scale * g (Foret et al. 2021, eq. 2), for ASAM w + scale * T^2 * g.
template <typename T>
FUSED_SAM_INLINE T ascend(T param, T grad, T scale, bool adaptive, T eta) {
  const T t = absolute(param) + eta;
  return param + scale * (adaptive ? t * t * grad : grad);
}

// rho / norm, or 0 where there is no direction: nothing moves then.
template <typename T>
FUSED_SAM_INLINE T ascent_scale(T rho, T sq_norm) {
  const T norm = square_root(sq_norm);
  return is_finite(norm) && norm > T(0) ? rho / norm : T(0);
}

// ------------------------------------------------------------------------------------------- rules

// A rule is a struct with
//   kVariants        how many combinations of options touch different states; group.options is one
//   kCounts          whether it keeps "step"
//   uses(o, k)       whether variant o has the state k
//   update<o>(...)   -> the new param; state[k] is updated in place where used

template <typename T>
FUSED_SAM_INLINE T lerp(T start, T end, T weight) {
  return weight < T(0.5) ? start + weight * (end - start) : end - (end - start) * (T(1) - weight);
}

// The gradient as the rules take it: unscaled, downhill, with the coupled weight decay.
template <typename T>
FUSED_SAM_INLINE T descent(T grad, T param, const Step<T>& step) {
  grad = step.descent * grad;
  // Without decay the weight must not enter: 0 * inf is NaN.
  const T decay = step.coupled_weight_decay;
  return decay != T(0) ? grad + decay * param : grad;
}

constexpr int kMaxStates = 3;

struct Sgd {
  static constexpr int kVariants = 2;
  static constexpr int kMomentum = 1;
  static constexpr bool kCounts = false;

  static FUSED_SAM_INLINE constexpr bool uses(int options, int k) {
    return k == 0 && (options & kMomentum);
  }

  // state: momentum_buffer
  template <int kOptions, typename T>
  static FUSED_SAM_INLINE T update(T param, T grad, T (&state)[kMaxStates], const Hyper<T>& group,
                                   const Step<T>& step) {
    grad = descent(grad, param, step);
    if (kOptions & kMomentum) {
      T& momentum_buffer = state[0];
      momentum_buffer = group.momentum * momentum_buffer + step.one_minus_dampening * grad;
      grad = group.nesterov != T(0) ? grad + group.momentum * momentum_buffer : momentum_buffer;
    }
    return param - group.lr * grad;
  }
};

struct Adam {
  static constexpr int kVariants = 2;
  static constexpr int kAmsgrad = 1;
  static constexpr bool kCounts = true;

  static FUSED_SAM_INLINE constexpr bool uses(int options, int k) {
    return k < 2 || (options & kAmsgrad);
  }

  // state: exp_avg, exp_avg_sq, max_exp_avg_sq
  template <int kOptions, typename T>
  static FUSED_SAM_INLINE T update(T param, T grad, T (&state)[kMaxStates], const Hyper<T>& group,
                                   const Step<T>& step) {
    grad = descent(grad, param, step);
    param = step.decay * param;
    T& exp_avg = state[0];
    exp_avg = lerp(exp_avg, grad, group.one_minus_beta1);
    T exp_avg_sq = group.beta2 * state[1] + group.one_minus_beta2 * grad * grad;
    state[1] = exp_avg_sq;
    if (kOptions & kAmsgrad) {
      // NaN stays, as in torch.maximum.
      exp_avg_sq = state[2] > exp_avg_sq || state[2] != state[2] ? state[2] : exp_avg_sq;
      state[2] = exp_avg_sq;
    }
    const T denom = square_root(exp_avg_sq / step.bias_correction2) + group.eps;
    return param - step.step_size * (exp_avg / denom);
  }
};

struct RmsProp {
  static constexpr int kVariants = 4;
  static constexpr int kMomentum = 1;
  static constexpr int kCentered = 2;
  static constexpr bool kCounts = true;

  static FUSED_SAM_INLINE constexpr bool uses(int options, int k) {
    return k == 0 || (k == 1 && (options & kMomentum)) || (k == 2 && (options & kCentered));
  }

  // state: square_avg, momentum_buffer, grad_avg
  template <int kOptions, typename T>
  static FUSED_SAM_INLINE T update(T param, T grad, T (&state)[kMaxStates], const Hyper<T>& group,
                                   const Step<T>& step) {
    grad = descent(grad, param, step);
    T& square_avg = state[0];
    square_avg = group.beta2 * square_avg + group.one_minus_beta2 * grad * grad;
    T avg = square_avg;
    if (kOptions & kCentered) {
      T& grad_avg = state[2];
      grad_avg = lerp(grad_avg, grad, group.one_minus_beta2);
      // Rounding can take this variance below zero, where torch.optim.RMSprop gives NaN.
      avg = square_avg - grad_avg * grad_avg;
      avg = avg < T(0) ? T(0) : avg;
    }
    T update = grad / (square_root(avg) + group.eps);
    if (kOptions & kMomentum) {
      T& momentum_buffer = state[1];
      momentum_buffer = group.momentum * momentum_buffer + update;
      update = momentum_buffer;
    }
    return param - group.lr * update;
  }
};

// Whether a rule has the variant `options`, and that one all its states. Compared as the number it
// is in the table: a NaN there is no variant, and casting it would be undefined.
template <typename Rule, typename T>
FUSED_SAM_INLINE bool has_states(T options, const bool (&has)[kMaxStates]) {
  for (int variant = 0; variant < Rule::kVariants; ++variant) {
    if (options != T(variant)) continue;
    for (int k = 0; k < kMaxStates; ++k) {
      if (Rule::uses(variant, k) && !has[k]) return false;
    }
    return true;
  }
  return false;
}

}  // namespace FUSED_SAM_ISA
}  // namespace fused_sam
