// The CPU kernels of the best instruction set (or FUSED_SAM_CPU's) against the textbook, with
// threads of its own in place of torch's: one span after the other goes to the next free thread.
#include <atomic>
#include <numeric>
#include <optional>
#include <thread>

#include "../../csrc/cpu/kernels.h"
#define MIXED  // the dtypes of a bucket
#include "cases.h"

namespace {

using namespace cases;

constexpr int kMaxThreads = 3;

template <typename F>
void parallel(int64_t spans, int threads, const F& f) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t span; (span = next++) < spans;) f(span, span + 1);
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

template <typename K>
class Runner {
 public:
  using T = typename K::T;
  static constexpr bool kDirects = true;

  std::vector<double> reduce(cases::Bucket<K>& bucket, const Options& o, SumsId id,
                             const double* earlier = nullptr) {
    if (id == SumsId::kGram) return reduce<Gram, double>(bucket, o, id, earlier);
    if (id == SumsId::kPNormMax) return reduce<PNormMax, T>(bucket, o, id, earlier);
    return reduce<Squares, T>(bucket, o, id, earlier);
  }

  // Like: sums that have the count, and the maximum or not, of those.
  template <typename Like, typename Term>
  std::vector<double> reduce(cases::Bucket<K>& bucket, const Options& o, SumsId id,
                             const double* earlier) {
    Problem p = problem(bucket, o, true);
    p.earlier = earlier;
    p.kept = bucket.kept;
    p.hyper = hyper_->of(id);
    const int64_t spans = num_spans(p.size);
    std::vector<Term> partials(Like::kCount * spans, Term(NAN)), again = partials;
    const auto kernel = kernels().reduce[static_cast<int>(id)][compute_of(K::types())];
    parallel(spans, kMaxThreads,
             [&](int64_t begin, int64_t end) { kernel(p, partials.data(), begin, end); });
    kernel(p, again.data(), 0, spans);
    EXPECT(!std::memcmp(partials.data(), again.data(), partials.size() * sizeof(Term)),
           "the number of threads changes the bits");
    std::vector<double> totals(Like::kCount);
    for (size_t i = 0; i < partials.size(); ++i) {
      double& total = totals[i / spans];
      total = words::add<Like::kMax>(total, static_cast<double>(partials[i]));
    }
    return totals;
  }

  void ascend_(cases::Bucket<K>& bucket, const Options& o, double total) {
    const Problem p = problem(bucket, o, true);
    const auto kernel = kernels().ascend_[static_cast<int>(o.ascent)][compute_of(K::types())];
    parallel(num_spans(p.size), kMaxThreads,
             [&](int64_t begin, int64_t end) { kernel(p, &total, kNumber, begin, end); });
  }

  double update_(cases::Bucket<K>& bucket, const Options& o, bool skip) {
    const Problem p = problem(bucket, o, false);
    std::vector<T> partials(o.follows ? num_spans(p.size) : 0, T(NAN));
    void* const sums = o.follows ? partials.data() : nullptr;
    for (size_t i = 0; p.step && !skip && i < bucket.step.size(); ++i) {
      if (bucket.has_grad(i)) bucket.step[i] += 1;
    }
    const auto kernel = kernels().update_[static_cast<int>(o.rule)][compute_of(K::types())];
    parallel(num_spans(p.size), kMaxThreads,
             [&](int64_t begin, int64_t end) { kernel(p, o.grad_scale, skip, sums, begin, end); });
    return std::accumulate(partials.begin(), partials.end(), 0.0);
  }

  void restore_(cases::Bucket<K>& bucket, const Options& o) {
    Problem p = problem(bucket, o, false);
    p.grads = nullptr;
    const auto kernel = kernels().restore_;
    parallel(num_spans(p.size), kMaxThreads,
             [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  }

 private:
  // ascent: whether it is for that; else for the rule.
  Problem problem(cases::Bucket<K>& bucket, const Options& o, bool ascent) {
    hyper_.emplace(o);
    flags_ = bucket.bits(o);
    Problem p = {};
    p.types = K::types();
    p.saved = bucket.saved;
    p.kept = o.blends() ? bucket.kept : nullptr;
    p.average = o.averages() ? bucket.average : nullptr;
    p.direction = o.looks ? bucket.direction : nullptr;
    p.numbers = kNumbers;
    p.blend_hyper = hyper_->of_blend(o);
    p.blend = o.blend();
    loss_scale_ = o.grad_scale;
    p.loss_scale = &loss_scale_;
    bucket.give_states(p.states, o);
    p.step = o.rule == RuleId::kSgd ? nullptr : bucket.step.data();
    p.slots = bucket.slots.data();
    p.grads = bucket.addresses.data();
    p.flags = flags_.data();
    p.hyper = ascent ? hyper_->of(o.norm()) : hyper_->of(o.rule);
    p.decay = o.follows ? hyper_->decay : nullptr;
    p.num_slots = static_cast<int64_t>(bucket.slots.size());
    p.size = bucket.size;
    p.stream = runs_++ % 2;
    return p;
  }

  std::optional<Hyper<T>> hyper_;
  std::vector<int32_t> flags_;
  double loss_scale_ = 1;
  int runs_ = 0;
};

}  // namespace

int main() {
  std::printf("%s\n", fused_sam::kernels().name);
  // Around a vector, a run of the sum, a tile, and a span.
  return cases::run_dtypes<Runner>(
      {5, 1, 64, 1025, 0, 3, 2 * 16384 + 7, 16384, 511, 513, 1030, 77});
}
