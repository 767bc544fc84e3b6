// The only file that sees torch: schemas, checks, and the way from tensors to memory. On the stable
// ABI of LibTorch, so that one binary serves many versions. Compiled twice: into the CPU library,
// and with FUSED_SAM_CUDA into the CUDA one, which adds implementations to the CPU library's
// schemas.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "rules.h"
#include "tables.h"
#ifdef FUSED_SAM_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "cuda/launch.h"
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#else
#include "cpu/kernels.h"
#endif

namespace fused_sam {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& tensor) {
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
      STD_TORCH_CHECK(false, "fused_sam: weights must be float32, float64, bfloat16 or float16");
  }
}

ScalarType compute_type(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

void check(const Tensor& tensor, const char* name, ScalarType type, int64_t numel,
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

RuleId rule_of(int64_t rule) {
  STD_TORCH_CHECK(rule >= 0 && rule < kNumRules, "fused_sam: unknown rule ", rule);
  return static_cast<RuleId>(rule);
}

// Calls f(Rule()) with the rule of a number.
template <typename F>
bool with_rule(RuleId rule, const F& f) {
  switch (rule) {
    case RuleId::kSgd:
      return f(Sgd());
    case RuleId::kAdam:
      return f(Adam());
    case RuleId::kRmsProp:
      return f(RmsProp());
  }
  return false;
}

#ifndef FUSED_SAM_CUDA

// A bucket's memory as the kernels take it, checked. The pinned weights are the list's.
struct Bucket {
  Dtype dtype;
  Problem problem = {};
  std::vector<void*> pinned;

  Bucket(const Tensor& weights, const std::vector<Tensor>& pinned_weights, const Tensor& saved,
         const Tensor& slots, const Tensor& grads, const Tensor& hyper)
      : dtype(dtype_of(saved)) {
    Problem& p = problem;
    p.num_slots = grads.numel();
    p.num_moved = p.num_slots - static_cast<int64_t>(pinned_weights.size());
    p.size = saved.numel();
    check(weights, "weights", saved.scalar_type(), -1, saved);
    check(slots, "slots", ScalarType::Long, p.num_slots * 4, saved);
    check(grads, "grads", ScalarType::Long, p.num_slots, saved);
    check(hyper, "hyper", compute_type(dtype), -1, saved);
    STD_TORCH_CHECK(saved.is_contiguous(), "fused_sam: saved must be contiguous");
    STD_TORCH_CHECK(p.num_moved >= 0 && hyper.numel() % kHyperSize == 0,
                    "fused_sam: tables of wrong size");
    p.slots = static_cast<const Slot*>(slots.const_data_ptr());
    const int64_t moved_size = weights.numel() < p.size ? weights.numel() : p.size;
    for (int64_t i = 0; i < p.num_slots; ++i) {
      const Slot& slot = p.slots[i];
      const bool moved = i < p.num_moved;
      const int64_t limit = moved ? moved_size : p.size;
      STD_TORCH_CHECK(slot.start >= (i ? p.slots[i - 1].start + p.slots[i - 1].numel : 0) &&
                          slot.start <= limit && slot.numel >= 0 &&
                          slot.numel <= limit - slot.start && slot.row >= 0 &&
                          slot.row < hyper.numel() / kHyperSize,
                      "fused_sam: slot ", i, " does not fit its bucket");
      if (!moved) {
        const Tensor& memory = pinned_weights[i - p.num_moved];
        check(memory, "a pinned weight", saved.scalar_type(), slot.numel, saved);
        pinned.push_back(memory.mutable_data_ptr());
      }
    }
    p.weights = weights.mutable_data_ptr();
    p.pinned = pinned.data();
    p.saved = saved.mutable_data_ptr();
    p.grads = static_cast<const int64_t*>(grads.const_data_ptr());
    p.hyper = hyper.const_data_ptr();
    // Where the buffers stay in the caches, going past them costs more than it saves.
    constexpr int64_t kStreamBytes = 16 << 20;
    p.stream = p.size * static_cast<int64_t>(saved.element_size()) >= kStreamBytes;
  }
};

template <typename F>
void parallel_spans(int64_t size, const F& f) {
  // One span for each thread at least: some 10 us of work against 5 us for waking a thread.
  torch::stable::parallel_for(0, num_spans(size), 1, f);
}

template <typename T>
T sum_of(const T* values, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(values[i]);
  return static_cast<T>(sum);
}

// `sq_norm` as one number of the compute type.
struct SqNorm {
  double f64;
  float f32;
  const void* pointer;

  SqNorm(const void* partials, int64_t n, Dtype dtype) {
    if (dtype == Dtype::kFloat64) {
      f64 = sum_of(static_cast<const double*>(partials), n);
      pointer = &f64;
    } else {
      f32 = sum_of(static_cast<const float*>(partials), n);
      pointer = &f32;
    }
  }
};

Tensor sq_norm(Tensor weights, std::vector<Tensor> pinned, Tensor saved, Tensor slots, Tensor grads,
               Tensor hyper, bool by_group) {
  const Bucket bucket(weights, pinned, saved, slots, grads, hyper);
  const Problem& p = bucket.problem;
  // A bucket of empty parameters alone has no span; its norm is 0.
  const int64_t spans = num_spans(p.size);
  Tensor partials =
      torch::stable::new_zeros(saved, {spans ? spans : 1}, compute_type(bucket.dtype));
  void* out = partials.mutable_data_ptr();
  const auto kernel = kernels().sq_norm[static_cast<int>(bucket.dtype)];
  parallel_spans(p.size, [&](int64_t begin, int64_t end) { kernel(p, by_group, out, begin, end); });
  return partials;
}

void perturb_(Tensor weights, std::vector<Tensor> pinned, Tensor saved, Tensor slots, Tensor grads,
              Tensor hyper, Tensor sq_norm) {
  const Bucket bucket(weights, pinned, saved, slots, grads, hyper);
  check(sq_norm, "sq_norm", compute_type(bucket.dtype), -1, saved);
  const Problem& p = bucket.problem;
  const SqNorm sum(sq_norm.const_data_ptr(), sq_norm.numel(), bucket.dtype);
  const auto kernel = kernels().perturb_[static_cast<int>(bucket.dtype)];
  parallel_spans(p.size, [&](int64_t begin, int64_t end) { kernel(p, sum.pointer, begin, end); });
}

void update_(Tensor weights, std::vector<Tensor> pinned, std::optional<Tensor> state0,
             std::optional<Tensor> state1, std::optional<Tensor> state2, std::optional<Tensor> step,
             std::optional<Tensor> /*ticket*/, Tensor saved, Tensor slots, Tensor grads,
             Tensor hyper, Tensor flags, std::optional<Tensor> grad_scale,
             std::optional<Tensor> found_inf, int64_t rule) {
  Bucket bucket(weights, pinned, saved, slots, grads, hyper);
  const RuleId id = rule_of(rule);
  Problem& p = bucket.problem;
  check(flags, "flags", ScalarType::Byte, p.num_slots, saved);
  p.flags = static_cast<const uint8_t*>(flags.const_data_ptr());
  const std::optional<Tensor>* states[] = {&state0, &state1, &state2};
  for (int k = 0; k < kMaxStates; ++k) {
    if (*states[k]) check(**states[k], "a state", saved.scalar_type(), p.size, saved);
    p.states[k] = memory(*states[k]);
  }
  if (step) check(*step, "step", ScalarType::Float, p.num_slots, saved);
  if (grad_scale) check(*grad_scale, "grad_scale", compute_type(bucket.dtype), 1, saved);
  if (found_inf) check(*found_inf, "found_inf", ScalarType::Float, 1, saved);
  p.step = memory<float>(step);
  const bool skip = found_inf && *memory<float>(found_inf) != 0.0f;
  double scale = 1;
  if (grad_scale) {
    scale = bucket.dtype == Dtype::kFloat64 ? *memory<double>(grad_scale)
                                            : static_cast<double>(*memory<float>(grad_scale));
  }
  const bool has[] = {state0.has_value(), state1.has_value(), state2.has_value()};
  const auto check_rows = [&](const auto* rows) {
    for (int64_t row = 0; row < hyper.numel() / kHyperSize; ++row) {
      const auto options = rows[row].options;
      const bool fits =
          with_rule(id, [&](auto rule) { return has_states<decltype(rule)>(options, has); });
      STD_TORCH_CHECK(fits, "fused_sam: group ", row, " has options ", options,
                      ", for which a state is missing");
    }
  };
  if (bucket.dtype == Dtype::kFloat64) {
    check_rows(static_cast<const Hyper<double>*>(p.hyper));
  } else {
    check_rows(static_cast<const Hyper<float>*>(p.hyper));
  }
  if (p.step && !skip) {
    for (int64_t i = 0; i < p.num_slots; ++i) {
      if (p.grads[i]) p.step[i] += 1.0f;
    }
  }
  const auto kernel = kernels().update_[rule][static_cast<int>(bucket.dtype)];
  parallel_spans(p.size, [&](int64_t begin, int64_t end) { kernel(p, scale, skip, begin, end); });
}

std::string cpu_kernels() { return kernels().name; }

#else  // FUSED_SAM_CUDA

// A bucket's memory on a GPU. `slots` holds the slots and then the chunks, both made by
// fused_sam/backends/native.py, which answers for what the host cannot check without waiting. The
// pinned weights are reached through the table; they are arguments so that the schemas are true.
// Its device is the current one for as long as it lives.
struct Bucket {
  Dtype dtype;
  DeviceProblem problem = {};
  int device;
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;

  Bucket(const Tensor& weights, const Tensor& saved, const Tensor& slots, const Tensor& grads,
         const Tensor& hyper)
      : dtype(dtype_of(saved)), device(saved.get_device_index()), guard(device) {
    DeviceProblem& p = problem;
    const int64_t num_slots = grads.numel();
    const int64_t num_chunks = (slots.numel() - 4 * num_slots) / 2;
    check(weights, "weights", saved.scalar_type(), -1, saved);
    check(slots, "slots", ScalarType::Long, 4 * num_slots + 2 * num_chunks, saved);
    check(grads, "grads", ScalarType::Long, num_slots, saved);
    check(hyper, "hyper", compute_type(dtype), -1, saved);
    STD_TORCH_CHECK(saved.is_contiguous(), "fused_sam: saved must be contiguous");
    STD_TORCH_CHECK(
        num_chunks >= 0 && num_chunks < (int64_t{1} << 31) && hyper.numel() % kHyperSize == 0,
        "fused_sam: tables of wrong size");
    p.weights = weights.mutable_data_ptr();
    p.saved = saved.mutable_data_ptr();
    p.slots = static_cast<const Slot*>(slots.const_data_ptr());
    p.chunks = reinterpret_cast<const Chunk*>(p.slots + num_slots);
    p.grads = static_cast<const int64_t*>(grads.const_data_ptr());
    p.hyper = hyper.const_data_ptr();
    p.num_slots = static_cast<int>(num_slots);
    p.num_chunks = static_cast<int>(num_chunks);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  }
};

void check_launch(const char* error) {
  STD_TORCH_CHECK(!error, "fused_sam: a CUDA kernel could not be launched: ", error);
}

Tensor sq_norm(Tensor weights, std::vector<Tensor> /*pinned*/, Tensor saved, Tensor slots,
               Tensor grads, Tensor hyper, bool by_group) {
  const Bucket bucket(weights, saved, slots, grads, hyper);
  Tensor partials = torch::stable::new_empty(saved, {kPartials}, compute_type(bucket.dtype));
  check_launch(launch_sq_norm(bucket.dtype, bucket.problem, partials.mutable_data_ptr(), by_group,
                              bucket.device, bucket.stream));
  return partials;
}

void perturb_(Tensor weights, std::vector<Tensor> /*pinned*/, Tensor saved, Tensor slots,
              Tensor grads, Tensor hyper, Tensor sq_norm) {
  const Bucket bucket(weights, saved, slots, grads, hyper);
  check(sq_norm, "sq_norm", compute_type(bucket.dtype), -1, saved);
  check_launch(launch_perturb_(bucket.dtype, bucket.problem, sq_norm.const_data_ptr(),
                               sq_norm.numel(), bucket.device, bucket.stream));
}

void update_(Tensor weights, std::vector<Tensor> /*pinned*/, std::optional<Tensor> state0,
             std::optional<Tensor> state1, std::optional<Tensor> state2, std::optional<Tensor> step,
             std::optional<Tensor> ticket, Tensor saved, Tensor slots, Tensor grads, Tensor hyper,
             Tensor flags, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
             int64_t rule) {
  Bucket bucket(weights, saved, slots, grads, hyper);
  DeviceProblem& p = bucket.problem;
  check(flags, "flags", ScalarType::Byte, p.num_slots, saved);
  p.flags = static_cast<const uint8_t*>(flags.const_data_ptr());
  const std::optional<Tensor>* states[] = {&state0, &state1, &state2};
  for (int k = 0; k < kMaxStates; ++k) {
    if (*states[k]) check(**states[k], "a state", saved.scalar_type(), saved.numel(), saved);
    p.states[k] = memory(*states[k]);
  }
  if (step) check(*step, "step", ScalarType::Float, p.num_slots, saved);
  if (grad_scale) check(*grad_scale, "grad_scale", compute_type(bucket.dtype), 1, saved);
  if (found_inf) check(*found_inf, "found_inf", ScalarType::Float, 1, saved);
  STD_TORCH_CHECK(ticket, "fused_sam: update_ on CUDA needs a ticket");
  // Which variant a group wants stands on the device, where looking would wait for it. The caller
  // makes the table and chooses the states from the same options; here they must suffice for one.
  const bool has[] = {state0.has_value(), state1.has_value(), state2.has_value()};
  const bool fits = with_rule(rule_of(rule), [&](auto rule) {
    using Rule = decltype(rule);
    bool one = false;
    for (int options = 0; options < Rule::kVariants; ++options) {
      one = one || has_states<Rule>(options, has);
    }
    return one;
  });
  STD_TORCH_CHECK(fits, "fused_sam: a state is missing that every variant of the rule needs");
  check(*ticket, "ticket", ScalarType::Int, 1, saved);
  p.step = memory<float>(step);
  check_launch(launch_update_(bucket.dtype, rule_of(rule), p, memory(grad_scale),
                              memory<float>(found_inf), memory<unsigned>(ticket), bucket.device,
                              bucket.stream));
}

#endif

}  // namespace
}  // namespace fused_sam

#ifndef FUSED_SAM_CUDA

// pinned: the weights of the last slots, which are not in `weights`. grads: their addresses.
// The tables are described in tables.h and rules.h (Hyper), the operations in
// fused_sam/backends/interface.py.
STABLE_TORCH_LIBRARY(fused_sam, m) {
  m.def(
      "sq_norm(Tensor weights, Tensor[] pinned, Tensor saved, Tensor slots, Tensor grads, "
      "Tensor hyper, bool by_group) -> Tensor");
  m.def(
      "perturb_(Tensor(a!) weights, Tensor(b!)[] pinned, Tensor(c!) saved, Tensor slots, "
      "Tensor grads, Tensor hyper, Tensor sq_norm) -> ()");
  m.def(
      "update_(Tensor(a!) weights, Tensor(b!)[] pinned, Tensor(c!)? state0, Tensor(d!)? state1, "
      "Tensor(e!)? state2, Tensor(f!)? step, Tensor(g!)? ticket, Tensor saved, Tensor slots, "
      "Tensor grads, "
      "Tensor hyper, Tensor flags, Tensor? grad_scale, Tensor? found_inf, int rule) -> ()");
  m.def("cpu_kernels() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fused_sam, CPU, m) {
  m.impl("sq_norm", TORCH_BOX(&fused_sam::sq_norm));
  m.impl("perturb_", TORCH_BOX(&fused_sam::perturb_));
  m.impl("update_", TORCH_BOX(&fused_sam::update_));
}

STABLE_TORCH_LIBRARY_IMPL(fused_sam, CompositeExplicitAutograd, m) {
  m.impl("cpu_kernels", TORCH_BOX(&fused_sam::cpu_kernels));
}

#else

STABLE_TORCH_LIBRARY_IMPL(fused_sam, CUDA, m) {
  m.impl("sq_norm", TORCH_BOX(&fused_sam::sq_norm));
  m.impl("perturb_", TORCH_BOX(&fused_sam::perturb_));
  m.impl("update_", TORCH_BOX(&fused_sam::update_));
}

#endif
