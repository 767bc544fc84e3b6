// The way from bindings.cpp to the CUDA kernels, without CUDA's headers.
#pragma once

#include <cstdint>

#include "../tables.h"

namespace fused_sam {

// Elements of one parameter that a block takes at a time: 16 for each thread.
constexpr int kChunk = 4096;

// Length of reduce's scratch: more blocks than a GPU holds at once, so that every block has its own
// partial sum and the length does not depend on the GPU.
constexpr int kPartials = 2048;  // for each number

struct Chunk {
  int64_t slot;
  int64_t offset;  // within the slot
};

// A bucket's memory and tables on the device, as Problem in cpu/kernels.h.
struct DeviceProblem {
  void* saved;
  void* kept;
  void* average;
  void* direction;
  void* states[3];
  float* step;
  const Slot* slots;
  const Chunk* chunks;
  const int64_t* grads;  // null for restore_
  const int32_t* flags;
  const void* hyper;
  const void* decay;
  const double* earlier;
  const double* numbers;
  const void* blend_hyper;
  const double* loss_scale;
  double* partials;  // (kPartials,), scratch, if there is total
  double* total;     // the squares of the momentum, where a climb along it comes next, or null
  int blend;
  bool after;  // the blend subtracts something after the rule's step, or leaves a direction
  int num_slots;
  int num_chunks;
};

// All return null, or what went wrong. device: the current one. stream: a cudaStream_t of it.
const char* launch_reduce(Dtype dtype, int64_t sums, const DeviceProblem& p, double* partials,
                          double* total, unsigned* ticket, int device, void* stream);
const char* launch_ascend_(Dtype dtype, int64_t ascent, const DeviceProblem& p, const double* total,
                           int64_t* climb, const int64_t* number_at, int64_t number, int device,
                           void* stream);
const char* launch_update_(Dtype dtype, int64_t rule, const DeviceProblem& p,
                           const void* grad_scale, const float* found_inf, unsigned* ticket,
                           int64_t* climb, int device, void* stream);
const char* launch_restore_(Dtype dtype, const DeviceProblem& p, int64_t* climb, int device,
                            void* stream);

}  // namespace fused_sam
