// The CPU kernels as plain functions on memory, one set for each instruction set.
//
// Work is cut into spans of the flat buffers, kSpan elements each, whatever the number of threads:
// so the partial sums, and with them every bit of the result, do not depend on it.
#pragma once

#include <cstdint>

#include "../mathematics.h"
#include "../tables.h"

namespace fused_sam {

// 64 KiB of float32: several buffers of it fit a core's L2, and a span takes some 10 us.
constexpr int64_t kSpan = 16384;

// A bucket's memory and tables; T is the compute type. Weights, gradients, masters and states each
// have a dtype of their own.
struct Problem {
  void* saved;               // (size,), the weights w, or the masters
  void* kept;                // (size,), gradients at w, or null
  void* average;             // T (size,), of the gradients at w, or null
  void* direction;           // (size,) T, where the blend goes, or null: then the rule sees it
  void* states[3];           // (size,) or null
  float* step;               // (num_slots,) or null
  const Slot* slots;         // (num_slots,), by rising start; they tell where the weights are
  const int64_t* grads;      // (num_slots,): addresses of gradients (numel,); null for restore_
  const int32_t* flags;      // (num_slots,)
  const void* hyper;         // Columns<T> (rows,) of what is computed
  const void* decay;         // T (rows,), of weights ahead of w on the way from there; or null
  const double* earlier;     // the numbers that a sum needs, or null
  const double* numbers;     // what the coefficients of a blend are made of, or null
  const void* blend_hyper;   // the blend's Columns<T> (rows,), or null
  const double* loss_scale;  // of both gradients; null for 1
  int blend;                 // its number in FUSED_SAM_BLENDS; negative: none
  Types types;
  int64_t num_slots;
  int64_t size;
  bool stream;  // buffers too large for the caches: store past them what is not read again soon
};

inline int64_t num_spans(int64_t size) { return (size + kSpan - 1) / kSpan; }

// partials: (count, num_spans) of T, or of double where the sums are wide. Writes those of the
// spans [begin, end).
using Reduce = void (*)(const Problem&, void* partials, int64_t begin, int64_t end);
// numbers: those that the ascent's sums gave over all buckets. number: the climb's.
using Ascend = void (*)(const Problem&, const double* numbers, int64_t number, int64_t begin,
                        int64_t end);
// skip: restore only. `step` counts the running step already. partials: (num_spans,) of T, for the
// squares of the momentum, or null.
using Update = void (*)(const Problem&, double grad_scale, bool skip, void* partials, int64_t begin,
                        int64_t end);
using Restore = void (*)(const Problem&, int64_t begin, int64_t end);

// The compute types: float32, and float64 for weights of that.
constexpr int kNumComputes = 2;

inline int compute_of(const Types& types) { return types.weights == Dtype::kFloat64; }

struct Kernels {
  const char* name;
  Reduce reduce[kNumSums][kNumComputes];
  Ascend ascend_[kNumAscents][kNumComputes];
  Update update_[kNumRules][kNumComputes];
  Restore restore_;
};

// The best set that this machine can run; FUSED_SAM_CPU names another one.
const Kernels& kernels();

// Whether this machine can run any of them.
bool run_here();

}  // namespace fused_sam
