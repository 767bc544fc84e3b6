// What Python, the CPU kernels and the CUDA kernels agree on: dtypes and the slot table.
#pragma once

#include <cstdint>

namespace fused_sam {

enum class Dtype : int { kFloat32, kFloat64, kBFloat16, kFloat16 };
constexpr int kNumDtypes = 4;

// The dtypes of a bucket's buffers. Where `saved` is wider than the weights it holds masters:
// float32 besides bfloat16 or float16.
struct Types {
  Dtype weights;
  Dtype grads;
  Dtype saved;
  Dtype kept;
  Dtype states[3];
};

// One parameter: its place in the flat buffers, in elements, and its row of hyperparameters.
struct Slot {
  int64_t start;
  int64_t numel;
  int64_t row;
  int64_t weights;  // their address, wherever they are
};

// The bits of a slot; fused_sam/backends/tables.py sets them.
constexpr int32_t kPerturbed = 1;    // the weights w are in `saved`
constexpr int32_t kFresh = 2;        // the rule's state is as it began
constexpr int32_t kMissing = 4;      // there is no gradient
constexpr int32_t kAligned = 8;      // weights and gradient allow 128-bit accesses
constexpr int32_t kMaximize = 16;    // the group goes uphill
constexpr int32_t kReadsParam = 32;  // the terms of the sum need the weights
constexpr int32_t kHeld = 64;        // the gradient at w is in `kept`
constexpr int32_t kBlends = 128;     // the rule sees a blend of the gradients
constexpr int kKeptShift = 8;        // from here on: which of the rule's states the group keeps
constexpr unsigned kKeptMask = 255;
constexpr int32_t kSummed = 1 << 16;  // the sum of its new momentum's squares is wanted
constexpr int32_t kStays = 1 << 17;   // perturbed: the new weights go to `saved`, and only there

}  // namespace fused_sam
