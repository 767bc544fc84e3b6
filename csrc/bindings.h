// What the bindings of both libraries share: the way from tensors to memory, checked. On the stable
// ABI of LibTorch, so that one binary serves many versions.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "mathematics.h"
#include "tables.h"

namespace fused_sam {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false,
                      "fused_sam: saved and states must be float32, float64, bfloat16 or float16");
  }
}

inline ScalarType compute_type(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

// numel: how many elements it must have; any number if that is negative.
inline void check(const Tensor& tensor, const char* name, ScalarType type, int64_t numel,
                  const Tensor& like) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, "fused_sam: ", name, " has a wrong dtype");
  STD_TORCH_CHECK(tensor.is_contiguous(), "fused_sam: ", name, " must be contiguous");
  STD_TORCH_CHECK(
      tensor.is_cpu() == like.is_cpu() && tensor.get_device_index() == like.get_device_index(),
      "fused_sam: ", name, " is on another device than the weights");
  STD_TORCH_CHECK(numel < 0 || tensor.numel() == numel, "fused_sam: ", name, " has ",
                  tensor.numel(), " elements, expected ", numel);
}

template <typename T = void>
T* memory(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<T*>(tensor->mutable_data_ptr()) : nullptr;
}

inline int64_t check_index(int64_t index, int64_t count, const char* what) {
  STD_TORCH_CHECK(index >= 0 && index < count, "fused_sam: unknown ", what, " ", index);
  return index;
}

// What the generated mathematics says of each value, by its number.
#define FUSED_SAM_COLUMNS(value) value::kColumns,
#define FUSED_SAM_ALWAYS(value) value::kAlways,
#define FUSED_SAM_STATES(value) value::kStates,
#define FUSED_SAM_COUNTS(value) value::kCounts,
#define FUSED_SAM_MOMENTUM(value) value::kMomentum,
#define FUSED_SAM_EARLIER(value) value::kEarlier,
#define FUSED_SAM_MAX(value) value::kMax,
#define FUSED_SAM_COUNT(value) value::kCount,
#define FUSED_SAM_WIDE(value) value::kWide,
#define FUSED_SAM_READS_KEPT(value) value::kReadsKept,
#define FUSED_SAM_NUMBERS(value) value::kNumbers,
#define FUSED_SAM_AVERAGES(value) value::Average::kIs,
#define FUSED_SAM_AFTER(value) value::kAfter,
#define FUSED_SAM_DIRECTS(value) value::kDirects,
constexpr int kSumsColumns[] = {FUSED_SAM_SUMS(FUSED_SAM_COLUMNS)};
constexpr int kSumsEarlier[] = {FUSED_SAM_SUMS(FUSED_SAM_EARLIER)};
constexpr bool kSumsMax[] = {FUSED_SAM_SUMS(FUSED_SAM_MAX)};
constexpr int kSumsCount[] = {FUSED_SAM_SUMS(FUSED_SAM_COUNT)};
constexpr bool kSumsWide[] = {FUSED_SAM_SUMS(FUSED_SAM_WIDE)};
constexpr bool kSumsReadsKept[] = {FUSED_SAM_SUMS(FUSED_SAM_READS_KEPT)};
constexpr bool kSumsAverages[] = {FUSED_SAM_SUMS(FUSED_SAM_AVERAGES)};
constexpr int kBlendColumns[] = {FUSED_SAM_BLENDS(FUSED_SAM_COLUMNS)};
constexpr int kBlendNumbers[] = {FUSED_SAM_BLENDS(FUSED_SAM_NUMBERS)};
constexpr bool kBlendAfter[] = {FUSED_SAM_BLENDS(FUSED_SAM_AFTER)};
constexpr bool kBlendDirects[] = {FUSED_SAM_BLENDS(FUSED_SAM_DIRECTS)};
constexpr int kAscentNumbers[] = {FUSED_SAM_ASCENTS(FUSED_SAM_NUMBERS)};
constexpr int kAscentColumns[] = {FUSED_SAM_ASCENTS(FUSED_SAM_COLUMNS)};
constexpr bool kAscentAverages[] = {FUSED_SAM_ASCENTS(FUSED_SAM_AVERAGES)};
constexpr int kRuleColumns[] = {FUSED_SAM_RULES(FUSED_SAM_COLUMNS)};
constexpr unsigned kRuleAlways[] = {FUSED_SAM_RULES(FUSED_SAM_ALWAYS)};
constexpr int kRuleStates[] = {FUSED_SAM_RULES(FUSED_SAM_STATES)};
constexpr bool kRuleCounts[] = {FUSED_SAM_RULES(FUSED_SAM_COUNTS)};
constexpr int kRuleMomentum[] = {FUSED_SAM_RULES(FUSED_SAM_MOMENTUM)};

inline ScalarType scalar_type(Dtype dtype) {
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16,
                                   ScalarType::Half};
  return kTypes[static_cast<int>(dtype)];
}

// The dtypes of a bucket; those of its states come later. weights, grads: their numbers.
inline Types types_of(int64_t weights, int64_t grads, const Tensor& saved) {
  Types types = {};
  types.weights = static_cast<Dtype>(check_index(weights, kNumDtypes, "dtype of weights"));
  types.grads = static_cast<Dtype>(check_index(grads, kNumDtypes, "dtype of gradients"));
  types.saved = dtype_of(saved);
  const bool half = types.weights == Dtype::kBFloat16 || types.weights == Dtype::kFloat16;
  STD_TORCH_CHECK(types.saved == types.weights || (half && types.saved == Dtype::kFloat32),
                  "fused_sam: saved has a wrong dtype");
  return types;
}

// What is kept besides the gradients; null where nothing is. It has a dtype of its own.
inline void* check_kept(const std::optional<Tensor>& kept, const Tensor& saved, Types& types) {
  if (kept) {
    types.kept = dtype_of(*kept);
    check(*kept, "kept", scalar_type(types.kept), saved.numel(), saved);
  }
  return memory(kept);
}

// The average of the gradients, in the compute type; null where none is needed.
inline void* check_average(const std::optional<Tensor>& average, const Tensor& saved,
                           const Types& types, bool needed) {
  STD_TORCH_CHECK(average.has_value() == needed,
                  "fused_sam: average is there where it is needed, and only there");
  if (average) check(*average, "average", compute_type(types.weights), saved.numel(), saved);
  return memory(average);
}

// Where a climb's number is, on the weights' device; null where it is an argument.
inline const int64_t* check_number(const std::optional<Tensor>& number_at, const Tensor& saved) {
  if (number_at) check(*number_at, "number_at", ScalarType::Long, 1, saved);
  return number_at ? static_cast<const int64_t*>(number_at->const_data_ptr()) : nullptr;
}

// A blend and what its coefficients are made of: all of it is there, or nothing is.
inline void check_blend(const std::optional<Tensor>& kept, const std::optional<Tensor>& direction,
                        const std::optional<Tensor>& numbers,
                        const std::optional<Tensor>& blend_hyper,
                        const std::optional<Tensor>& loss_scale, const Tensor& saved, int64_t rows,
                        int64_t blend) {
  if (blend >= 0) check_index(blend, kNumBlends, "blend");
  STD_TORCH_CHECK(direction.has_value() == (blend >= 0 && kBlendDirects[blend]),
                  "fused_sam: direction is there where the blend leaves one, and only there");
  if (blend < 0) return;
  STD_TORCH_CHECK(kept && numbers && blend_hyper,
                  "fused_sam: a blend needs kept, numbers and its hyperparameters");
  if (direction) {
    check(*direction, "direction", compute_type(dtype_of(saved)), saved.numel(), saved);
  }
  check(*numbers, "numbers", ScalarType::Double, kBlendNumbers[blend], saved);
  check(*blend_hyper, "blend_hyper", compute_type(dtype_of(saved)), rows * kBlendColumns[blend],
        saved);
  if (loss_scale) check(*loss_scale, "loss_scale", ScalarType::Double, 1, saved);
}

// The numbers that were reduced before a sum, on the weights' device; null where it needs none.
inline const double* check_earlier(const std::optional<Tensor>& earlier, int64_t sums,
                                   const Tensor& saved) {
  STD_TORCH_CHECK(earlier.has_value() == (kSumsEarlier[sums] > 0),
                  "fused_sam: earlier is there where the sum needs it, and only there");
  if (earlier) check(*earlier, "earlier", ScalarType::Double, kSumsEarlier[sums], saved);
  return earlier ? static_cast<const double*>(earlier->const_data_ptr()) : nullptr;
}

// Checks the arguments of update_ and fills `types` and `states`; returns which of them are there,
// as bits. (An empty one is there and has no address.)
inline unsigned check_update(const std::optional<Tensor>& state0,
                             const std::optional<Tensor>& state1,
                             const std::optional<Tensor>& state2, const std::optional<Tensor>& step,
                             const std::optional<Tensor>& grad_scale,
                             const std::optional<Tensor>& found_inf, const Tensor& saved,
                             int64_t num_slots, int64_t rule, Types& types,
                             void* (&states)[kMaxStates]) {
  static_assert(kMaxStates == 3, "the operation update_ takes three states");
  const std::optional<Tensor>* given[] = {&state0, &state1, &state2};
  unsigned has = 0;
  for (int k = 0; k < kMaxStates; ++k) {
    if (*given[k]) {
      types.states[k] = dtype_of(**given[k]);
      check(**given[k], "a state", scalar_type(types.states[k]), saved.numel(), saved);
    }
    STD_TORCH_CHECK(*given[k] || !(kRuleAlways[rule] & 1u << k),
                    "fused_sam: a state is missing that the rule always needs");
    states[k] = memory(*given[k]);
    has |= (*given[k] ? 1u : 0u) << k;
  }
  STD_TORCH_CHECK(step.has_value() == kRuleCounts[rule],
                  "fused_sam: a rule that counts needs step");
  if (step) check(*step, "step", ScalarType::Float, num_slots, saved);
  if (grad_scale) {
    check(*grad_scale, "grad_scale", compute_type(dtype_of(saved)), 1, saved);
  }
  if (found_inf) check(*found_inf, "found_inf", ScalarType::Float, 1, saved);
  return has;
}

// What an update does besides, where a climb along the momentum comes next. has: which states are
// there.
inline void check_ahead(const std::optional<Tensor>& total, const std::optional<Tensor>& decay,
                        const Tensor& saved, int64_t rows, int64_t rule, unsigned has) {
  if (total) {
    check(*total, "total", ScalarType::Double, 1, saved);
    STD_TORCH_CHECK(kRuleMomentum[rule] >= 0 && (has & 1u << kRuleMomentum[rule]),
                    "fused_sam: total is asked for, and there is no momentum");
  }
  if (decay) check(*decay, "decay", compute_type(dtype_of(saved)), rows, saved);
}

}  // namespace fused_sam
