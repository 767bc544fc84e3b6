// The CPU library: the schemas of all operations, and their implementations for a CPU.
#include "../bindings.h"
#include "kernels.h"

namespace fused_sam {
namespace {

// A bucket's memory as the kernels take it, checked as far as it can be: for the addresses of
// weights and gradients fused_sam/backends/tables.py answers.
struct Bucket {
  Problem problem = {};

  Bucket(const Tensor& saved, const Tensor& slots, const std::optional<Tensor>& grads,
         const Tensor& flags, const std::optional<Tensor>& hyper, const Types& types, int columns) {
    Problem& p = problem;
    p.types = types;
    p.num_slots = flags.numel();
    p.size = saved.numel();
    check(slots, "slots", ScalarType::Long, p.num_slots * 4, saved);
    check(flags, "flags", ScalarType::Int, p.num_slots, saved);
    if (grads) check(*grads, "grads", ScalarType::Long, p.num_slots, saved);
    if (hyper) check(*hyper, "hyper", compute_type(types.weights), -1, saved);
    STD_TORCH_CHECK(saved.is_contiguous(), "fused_sam: saved must be contiguous");
    const int64_t numbers = hyper ? hyper->numel() : 0;
    STD_TORCH_CHECK(columns == 0 || numbers % columns == 0, "fused_sam: tables of wrong size");
    p.slots = static_cast<const Slot*>(slots.const_data_ptr());
    for (int64_t i = 0; i < p.num_slots; ++i) {
      const Slot& slot = p.slots[i];
      STD_TORCH_CHECK(slot.start >= (i ? p.slots[i - 1].start + p.slots[i - 1].numel : 0) &&
                          slot.start <= p.size && slot.numel >= 0 &&
                          slot.numel <= p.size - slot.start && slot.row >= 0 &&
                          (columns == 0 || slot.row < numbers / columns),
                      "fused_sam: slot ", i, " does not fit its bucket");
    }
    p.saved = saved.mutable_data_ptr();
    p.grads = grads ? static_cast<const int64_t*>(grads->const_data_ptr()) : nullptr;
    p.flags = static_cast<const int32_t*>(flags.const_data_ptr());
    p.hyper = numbers ? hyper->const_data_ptr() : nullptr;
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

void set_climb(const Tensor& climb, const Tensor& saved, int64_t number) {
  check(climb, "climb", ScalarType::Long, 1, saved);
  *static_cast<int64_t*>(climb.mutable_data_ptr()) = number;
}

template <typename T>
double all_of(const void* values, int64_t n, bool max) {
  double all = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double value = static_cast<double>(static_cast<const T*>(values)[i]);
    all = max ? words::maximum(all, value) : all + value;
  }
  return static_cast<double>(static_cast<T>(all));
}

Tensor reduce(Tensor saved, std::optional<Tensor> kept, std::optional<Tensor> average,
              std::optional<Tensor> earlier, std::optional<Tensor> /*ticket*/, Tensor slots,
              Tensor grads, Tensor flags, Tensor hyper, int64_t weight_dtype, int64_t grad_dtype,
              int64_t sums) {
  check_index(sums, kNumSums, "sums");
  const Types types = types_of(weight_dtype, grad_dtype, saved);
  Bucket bucket(saved, slots, grads, flags, hyper, types, kSumsColumns[sums]);
  Problem& p = bucket.problem;
  p.earlier = check_earlier(earlier, sums, saved);
  const int count = kSumsCount[sums];
  Tensor total = torch::stable::new_zeros(saved, {count}, ScalarType::Double);
  STD_TORCH_CHECK(!kSumsReadsKept[sums] || kept, "fused_sam: the sum needs kept");
  p.kept = check_kept(kept, saved, p.types);
  p.average = check_average(average, saved, types, kSumsAverages[sums]);
  const int64_t spans = num_spans(p.size);
  std::vector<double> partials(spans * count);  // of float or double
  const auto kernel = kernels().reduce[sums][compute_of(types)];
  parallel_spans(p.size,
                 [&](int64_t begin, int64_t end) { kernel(p, partials.data(), begin, end); });
  double* totals = static_cast<double*>(total.mutable_data_ptr());
  const bool wide = kSumsWide[sums] || types.weights == Dtype::kFloat64, max = kSumsMax[sums];
  for (int i = 0; i < count; ++i) {
    const void* all = partials.data();
    totals[i] = wide ? all_of<double>(static_cast<const double*>(all) + i * spans, spans, max)
                     : all_of<float>(static_cast<const float*>(all) + i * spans, spans, max);
  }
  return total;
}

void ascend_(Tensor saved, std::optional<Tensor> kept, std::optional<Tensor> average, Tensor climb,
             Tensor slots, Tensor grads, Tensor flags, Tensor hyper, Tensor total,
             std::optional<Tensor> number_at, int64_t number, int64_t weight_dtype,
             int64_t grad_dtype, int64_t ascent) {
  check_index(ascent, kNumAscents, "ascent");
  const Types types = types_of(weight_dtype, grad_dtype, saved);
  Bucket bucket(saved, slots, grads, flags, hyper, types, kAscentColumns[ascent]);
  check(total, "total", ScalarType::Double, kAscentNumbers[ascent], saved);
  const double* numbers = static_cast<const double*>(total.const_data_ptr());
  bucket.problem.kept = check_kept(kept, saved, bucket.problem.types);
  bucket.problem.average = check_average(average, saved, types, kAscentAverages[ascent]);
  STD_TORCH_CHECK(!kept || bucket.problem.types.kept == types.grads,
                  "fused_sam: kept has a wrong dtype: it gets the gradients");
  if (const int64_t* at = check_number(number_at, saved)) number = *at;
  set_climb(climb, saved, number);
  const auto kernel = kernels().ascend_[ascent][compute_of(types)];
  const Problem& p = bucket.problem;
  parallel_spans(p.size,
                 [&](int64_t begin, int64_t end) { kernel(p, numbers, number, begin, end); });
}

void update_(std::optional<Tensor> state0, std::optional<Tensor> state1,
             std::optional<Tensor> state2, std::optional<Tensor> step,
             std::optional<Tensor> /*ticket*/, Tensor climb, Tensor saved,
             std::optional<Tensor> kept, std::optional<Tensor> direction,
             std::optional<Tensor> total, Tensor slots, Tensor grads, Tensor flags, Tensor hyper,
             std::optional<Tensor> decay, std::optional<Tensor> numbers,
             std::optional<Tensor> blend_hyper, std::optional<Tensor> loss_scale,
             std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
             int64_t weight_dtype, int64_t grad_dtype, int64_t rule, int64_t blend) {
  check_index(rule, kNumRules, "rule");
  const Types types = types_of(weight_dtype, grad_dtype, saved);
  Bucket bucket(saved, slots, grads, flags, hyper, types, kRuleColumns[rule]);
  Problem& p = bucket.problem;
  const unsigned has = check_update(state0, state1, state2, step, grad_scale, found_inf, saved,
                                    p.num_slots, rule, p.types, p.states);
  p.step = memory<float>(step);
  check_blend(kept, direction, numbers, blend_hyper, loss_scale, saved,
              hyper.numel() / kRuleColumns[rule], blend);
  p.kept = check_kept(kept, saved, p.types);
  p.direction = memory(direction);
  p.numbers = memory<double>(numbers);
  p.blend_hyper = memory(blend_hyper);
  p.loss_scale = memory<double>(loss_scale);
  p.blend = static_cast<int>(blend);
  check_ahead(total, decay, saved, hyper.numel() / kRuleColumns[rule], rule, has);
  p.decay = memory(decay);
  const bool skip = found_inf && *memory<float>(found_inf) != 0.0f;
  double scale = 1;
  if (grad_scale) {
    scale = types.weights == Dtype::kFloat64 ? *memory<double>(grad_scale)
                                             : static_cast<double>(*memory<float>(grad_scale));
  }
  for (int64_t i = 0; i < p.num_slots; ++i) {
    if (p.flags[i] & kMissing) continue;
    const unsigned kept = static_cast<unsigned>(p.flags[i]) >> kKeptShift & kKeptMask;
    const bool fits = kept >> kRuleStates[rule] == 0 && (kept & ~has) == 0 &&
                      (kept & kRuleAlways[rule]) == kRuleAlways[rule];
    STD_TORCH_CHECK(fits, "fused_sam: slot ", i, " keeps the states ", kept,
                    ", of which one is missing or unknown");
  }
  if (p.step && !skip) {
    for (int64_t i = 0; i < p.num_slots; ++i) {
      if (!(p.flags[i] & kMissing)) p.step[i] += 1.0f;
    }
  }
  const int64_t spans = total ? num_spans(p.size) : 0;
  std::vector<double> partials(spans);  // of float or double
  void* sums = total ? partials.data() : nullptr;
  const auto kernel = kernels().update_[rule][compute_of(types)];
  parallel_spans(p.size,
                 [&](int64_t begin, int64_t end) { kernel(p, scale, skip, sums, begin, end); });
  set_climb(climb, saved, 0);
  if (total) {
    *memory<double>(total) = types.weights == Dtype::kFloat64 ? all_of<double>(sums, spans, false)
                                                              : all_of<float>(sums, spans, false);
  }
}

void restore_(Tensor climb, Tensor saved, Tensor slots, Tensor flags, int64_t weight_dtype) {
  const Types types = types_of(weight_dtype, 0, saved);  // no gradient is read
  const Bucket bucket(saved, slots, std::nullopt, flags, std::nullopt, types, 0);
  const auto kernel = kernels().restore_;
  const Problem& p = bucket.problem;
  parallel_spans(p.size, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  set_climb(climb, saved, 0);
}

std::string cpu_kernels() { return run_here() ? kernels().name : "none"; }

std::string mathematics() { return FUSED_SAM_MATHEMATICS; }

}  // namespace
}  // namespace fused_sam

// The weights are where `slots` says, and written there. grads: addresses. weight_dtype,
// grad_dtype: what is there, by its number in Dtype. The tables are described in tables.h, the rows
// of `hyper` in mathematics.h (Columns), the operations in fused_sam/backends/base.py.
STABLE_TORCH_LIBRARY(fused_sam, m) {
  m.def(
      "reduce(Tensor saved, Tensor? kept, Tensor? average, Tensor? earlier, Tensor(a!)? ticket, "
      "Tensor slots, Tensor grads, Tensor flags, Tensor hyper, int weight_dtype, int grad_dtype, "
      "int sums) "
      "-> Tensor");
  m.def(
      "ascend_(Tensor(a!) saved, Tensor(b!)? kept, Tensor(c!)? average, Tensor(d!) climb, "
      "Tensor slots, Tensor grads, Tensor flags, Tensor hyper, Tensor total, Tensor? number_at, "
      "int number, int weight_dtype, "
      "int grad_dtype, int ascent) -> ()");
  m.def(
      "update_(Tensor(a!)? state0, Tensor(b!)? state1, Tensor(c!)? state2, Tensor(d!)? step, "
      "Tensor(e!)? ticket, Tensor(f!) climb, Tensor(g!) saved, Tensor? kept, "
      "Tensor(h!)? direction, Tensor(i!)? total, Tensor slots, Tensor grads, Tensor flags, "
      "Tensor hyper, Tensor? decay, Tensor? numbers, Tensor? blend_hyper, Tensor? loss_scale, "
      "Tensor? grad_scale, "
      "Tensor? found_inf, int weight_dtype, int grad_dtype, int rule, int blend) -> ()");
  m.def(
      "restore_(Tensor(a!) climb, Tensor saved, Tensor slots, Tensor flags, int weight_dtype) "
      "-> ()");
  m.def("cpu_kernels() -> str");
  m.def("mathematics() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fused_sam, CPU, m) {
  m.impl("reduce", TORCH_BOX(&fused_sam::reduce));
  m.impl("ascend_", TORCH_BOX(&fused_sam::ascend_));
  m.impl("update_", TORCH_BOX(&fused_sam::update_));
  m.impl("restore_", TORCH_BOX(&fused_sam::restore_));
}

STABLE_TORCH_LIBRARY_IMPL(fused_sam, CompositeExplicitAutograd, m) {
  m.impl("cpu_kernels", TORCH_BOX(&fused_sam::cpu_kernels));
  m.impl("mathematics", TORCH_BOX(&fused_sam::mathematics));
}
