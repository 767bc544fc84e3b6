// The CUDA library: implementations for the schemas of the CPU library.
#include <torch/csrc/stable/accelerator.h>

#include "../bindings.h"
#include "launch.h"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace fused_sam {
namespace {

// A bucket's memory on a GPU. `slots` holds the slots and then the chunks, both made by
// fused_sam/backends/native/operations.py, which answers for what the host cannot check without
// waiting. Its device is the current one for as long as it lives.
struct Bucket {
  Dtype dtype;
  DeviceProblem problem = {};
  int device;
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;

  Bucket(const Tensor& saved, const Tensor& slots, const std::optional<Tensor>& grads,
         const Tensor& flags, const std::optional<Tensor>& hyper, const Types& types, int columns)
      : dtype(types.weights), device(saved.get_device_index()), guard(device) {
    STD_TORCH_CHECK(types.grads == dtype && types.saved == dtype,
                    "fused_sam: on CUDA all buffers must have the weights' dtype");
    DeviceProblem& p = problem;
    const int64_t num_slots = flags.numel();
    const int64_t num_chunks = (slots.numel() - 4 * num_slots) / 2;
    check(slots, "slots", ScalarType::Long, 4 * num_slots + 2 * num_chunks, saved);
    check(flags, "flags", ScalarType::Int, num_slots, saved);
    if (grads) check(*grads, "grads", ScalarType::Long, num_slots, saved);
    if (hyper) check(*hyper, "hyper", compute_type(dtype), -1, saved);
    STD_TORCH_CHECK(saved.is_contiguous(), "fused_sam: saved must be contiguous");
    STD_TORCH_CHECK(num_chunks >= 0 && num_chunks < (int64_t{1} << 31) &&
                        (columns == 0 || hyper->numel() % columns == 0),
                    "fused_sam: tables of wrong size");
    p.saved = saved.mutable_data_ptr();
    p.slots = static_cast<const Slot*>(slots.const_data_ptr());
    p.chunks = reinterpret_cast<const Chunk*>(p.slots + num_slots);
    p.grads = grads ? static_cast<const int64_t*>(grads->const_data_ptr()) : nullptr;
    p.flags = static_cast<const int32_t*>(flags.const_data_ptr());
    p.hyper = hyper ? hyper->const_data_ptr() : nullptr;
    p.num_slots = static_cast<int>(num_slots);
    p.num_chunks = static_cast<int>(num_chunks);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  }

  void* kept(const std::optional<Tensor>& kept, const Tensor& saved, Types types) const {
    void* memory = check_kept(kept, saved, types);
    STD_TORCH_CHECK(!kept || types.kept == dtype, "fused_sam: kept has a wrong dtype");
    return memory;
  }
};

void check_launch(const char* error) {
  STD_TORCH_CHECK(!error, "fused_sam: a CUDA kernel could not be launched: ", error);
}

unsigned* ticket_of(const std::optional<Tensor>& ticket, const Tensor& saved) {
  STD_TORCH_CHECK(ticket, "fused_sam: on CUDA a ticket is needed");
  check(*ticket, "ticket", ScalarType::Int, 1, saved);
  return memory<unsigned>(ticket);
}

int64_t* climb_of(const Tensor& climb, const Tensor& saved) {
  check(climb, "climb", ScalarType::Long, 1, saved);
  return static_cast<int64_t*>(climb.mutable_data_ptr());
}

Tensor reduce(Tensor saved, std::optional<Tensor> kept, std::optional<Tensor> average,
              std::optional<Tensor> earlier, std::optional<Tensor> ticket, Tensor slots,
              Tensor grads, Tensor flags, Tensor hyper, int64_t weight_dtype, int64_t grad_dtype,
              int64_t sums) {
  check_index(sums, kNumSums, "sums");
  const Types types = types_of(weight_dtype, grad_dtype, saved);
  Bucket bucket(saved, slots, grads, flags, hyper, types, kSumsColumns[sums]);
  bucket.problem.earlier = check_earlier(earlier, sums, saved);
  STD_TORCH_CHECK(!kSumsReadsKept[sums] || kept, "fused_sam: the sum needs kept");
  bucket.problem.kept = bucket.kept(kept, saved, types);
  bucket.problem.average = check_average(average, saved, types, kSumsAverages[sums]);
  const int count = kSumsCount[sums];
  Tensor partials = torch::stable::new_empty(saved, {count * kPartials}, ScalarType::Double);
  Tensor total = torch::stable::new_empty(saved, {count}, ScalarType::Double);
  check_launch(launch_reduce(bucket.dtype, sums, bucket.problem,
                             static_cast<double*>(partials.mutable_data_ptr()),
                             static_cast<double*>(total.mutable_data_ptr()),
                             ticket_of(ticket, saved), bucket.device, bucket.stream));
  return total;
}

void ascend_(Tensor saved, std::optional<Tensor> kept, std::optional<Tensor> average, Tensor climb,
             Tensor slots, Tensor grads, Tensor flags, Tensor hyper, Tensor total,
             std::optional<Tensor> number_at, int64_t number, int64_t weight_dtype,
             int64_t grad_dtype, int64_t ascent) {
  check_index(ascent, kNumAscents, "ascent");
  const Types types = types_of(weight_dtype, grad_dtype, saved);
  Bucket bucket(saved, slots, grads, flags, hyper, types, kAscentColumns[ascent]);
  bucket.problem.kept = bucket.kept(kept, saved, types);
  bucket.problem.average = check_average(average, saved, types, kAscentAverages[ascent]);
  check(total, "total", ScalarType::Double, kAscentNumbers[ascent], saved);
  check_launch(launch_ascend_(bucket.dtype, ascent, bucket.problem,
                              static_cast<const double*>(total.const_data_ptr()),
                              climb_of(climb, saved), check_number(number_at, saved), number,
                              bucket.device, bucket.stream));
}

void update_(std::optional<Tensor> state0, std::optional<Tensor> state1,
             std::optional<Tensor> state2, std::optional<Tensor> step, std::optional<Tensor> ticket,
             Tensor climb, Tensor saved, std::optional<Tensor> kept,
             std::optional<Tensor> direction, std::optional<Tensor> total, Tensor slots,
             Tensor grads, Tensor flags, Tensor hyper, std::optional<Tensor> decay,
             std::optional<Tensor> numbers, std::optional<Tensor> blend_hyper,
             std::optional<Tensor> loss_scale, std::optional<Tensor> grad_scale,
             std::optional<Tensor> found_inf, int64_t weight_dtype, int64_t grad_dtype,
             int64_t rule, int64_t blend) {
  check_index(rule, kNumRules, "rule");
  Types types = types_of(weight_dtype, grad_dtype, saved);
  Bucket bucket(saved, slots, grads, flags, hyper, types, kRuleColumns[rule]);
  DeviceProblem& p = bucket.problem;
  const unsigned has = check_update(state0, state1, state2, step, grad_scale, found_inf, saved,
                                    p.num_slots, rule, types, p.states);
  for (int k = 0; k < kMaxStates; ++k) {
    STD_TORCH_CHECK(!p.states[k] || types.states[k] == types.weights,
                    "fused_sam: a state has a wrong dtype");
  }
  p.step = memory<float>(step);
  check_blend(kept, direction, numbers, blend_hyper, loss_scale, saved,
              hyper.numel() / kRuleColumns[rule], blend);
  STD_TORCH_CHECK(!direction || bucket.dtype == Dtype::kFloat32,
                  "fused_sam: the CUDA kernels leave no direction of this dtype");
  p.direction = memory(direction);
  check_ahead(total, decay, saved, hyper.numel() / kRuleColumns[rule], rule, has);
  STD_TORCH_CHECK(!total || blend < 0, "fused_sam: a climb along the momentum takes no blend");
  std::optional<Tensor> partials;
  if (total) partials = torch::stable::new_empty(saved, {kPartials}, ScalarType::Double);
  p.partials = memory<double>(partials);
  p.total = memory<double>(total);
  p.decay = memory(decay);
  p.kept = bucket.kept(kept, saved, types);
  p.numbers = memory<double>(numbers);
  p.blend_hyper = memory(blend_hyper);
  p.loss_scale = memory<double>(loss_scale);
  p.blend = static_cast<int>(blend);
  p.after = blend >= 0 && (kBlendAfter[blend] || kBlendDirects[blend]);
  check_launch(launch_update_(bucket.dtype, rule, p, memory(grad_scale), memory<float>(found_inf),
                              ticket_of(ticket, saved), climb_of(climb, saved), bucket.device,
                              bucket.stream));
}

void restore_(Tensor climb, Tensor saved, Tensor slots, Tensor flags, int64_t weight_dtype) {
  const Types types = types_of(weight_dtype, weight_dtype, saved);
  const Bucket bucket(saved, slots, std::nullopt, flags, std::nullopt, types, 0);
  check_launch(launch_restore_(bucket.dtype, bucket.problem, climb_of(climb, saved), bucket.device,
                               bucket.stream));
}

std::string cuda_mathematics() { return FUSED_SAM_MATHEMATICS; }

}  // namespace
}  // namespace fused_sam

// Each library tells from which mathematics it was built: one of the two may be older.
STABLE_TORCH_LIBRARY_FRAGMENT(fused_sam, m) { m.def("cuda_mathematics() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(fused_sam, CompositeExplicitAutograd, m) {
  m.impl("cuda_mathematics", TORCH_BOX(&fused_sam::cuda_mathematics));
}

STABLE_TORCH_LIBRARY_IMPL(fused_sam, CUDA, m) {
  m.impl("reduce", TORCH_BOX(&fused_sam::reduce));
  m.impl("ascend_", TORCH_BOX(&fused_sam::ascend_));
  m.impl("update_", TORCH_BOX(&fused_sam::update_));
  m.impl("restore_", TORCH_BOX(&fused_sam::restore_));
}
