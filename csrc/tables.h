// What Python, the CPU kernels and the CUDA kernels agree on: dtypes, rules and the slot table.
#pragma once

#include <cstdint>

namespace fused_sam {

enum class Dtype : int { kFloat32, kFloat64, kBFloat16, kFloat16 };
constexpr int kNumDtypes = 4;

enum class RuleId : int { kSgd, kAdam, kRmsProp };
constexpr int kNumRules = 3;

// One parameter: its place in the flat buffers, in elements, and its row of hyperparameters.
struct Slot {
  int64_t start;
  int64_t numel;
  int64_t row;
  int64_t pinned;  // where the weights are, if not at `start` of the flat weights; else 0
};

// flags of a slot in update_
constexpr uint8_t kPerturbed = 1;  // the weights are in `saved`
constexpr uint8_t kFresh = 2;      // the state is still zero

}  // namespace fused_sam
