// The way from bindings.cpp to the CUDA kernels, without CUDA's headers.
#pragma once

#include <cstdint>

#include "../tables.h"

namespace fused_sam {

// Elements of one parameter that a block takes at a time: 16 for each thread.
constexpr int kChunk = 4096;

// Length of sq_norm's result: more blocks than a GPU holds at once, so that every block has its
// own partial sum and the length does not depend on the GPU.
constexpr int kPartials = 2048;

struct Chunk {
  int64_t slot;
  int64_t offset;  // within the slot
};

// A bucket's memory and tables on the device, as Problem in cpu/kernels.h.
struct DeviceProblem {
  void* weights;
  void* saved;
  void* states[3];
  float* step;
  const Slot* slots;
  const Chunk* chunks;
  const int64_t* grads;
  const uint8_t* flags;
  const void* hyper;
  int num_slots;
  int num_chunks;
};

// All return null, or what went wrong. device: the current one. stream: a cudaStream_t of it.
const char* launch_sq_norm(Dtype dtype, const DeviceProblem& p, void* partials, bool by_group,
                           int device, void* stream);
const char* launch_perturb_(Dtype dtype, const DeviceProblem& p, const void* sq_norm,
                            int64_t num_partials, int device, void* stream);
const char* launch_update_(Dtype dtype, RuleId rule, const DeviceProblem& p, const void* grad_scale,
                           const float* found_inf, unsigned* ticket, int device, void* stream);

}  // namespace fused_sam
