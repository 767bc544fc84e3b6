// The CUDA kernels on a CPU, against the textbook.
#include <optional>

#include "emulation.h"

// What is kept of the gradients is loaded under a condition, and used under the same.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "../../csrc/cuda/kernels.cuh"
#include "cases.h"

namespace {

using namespace cases;
using emulation::Order;

template <typename K>
class Runner {
 public:
  using S = typename K::W;  // of all
  using T = typename K::T;
  static constexpr bool kDirects = std::is_same_v<S, float>;

  std::vector<double> reduce(cases::Bucket<K>& bucket, const Options& o, SumsId id,
                             const double* earlier = nullptr) {
    std::vector<double> totals(3, NAN);
    in_every_order(
        bucket, {2, 3},
        [&](unsigned blocks, Order order) {
          std::vector<double> partials(3 * kPartials, NAN);
          unsigned ticket = 0;
          DeviceProblem p = problem(bucket, o, true);
          p.earlier = earlier;
          p.kept = bucket.kept;
          p.hyper = hyper_->of(id);
          int number = 0;
          launch(blocks, order, [&] {
            number = 0;
#define CASES_REDUCE(value) \
  if (number++ == int(id))  \
    return reduce_kernel<value, S>(p, partials.data(), totals.data(), &ticket);
            FUSED_SAM_SUMS(CASES_REDUCE)
#undef CASES_REDUCE
          });
          EXPECT(ticket == 0, "the ticket is %u afterwards", ticket);
          // Squares among them: the sum is as large as the terms.
          const double all = id == SumsId::kGram ? totals[0] + totals[1] + totals[2] : totals[0];
          return std::isnan(all) ? 0.0 : all;
        },
        id == SumsId::kGram);
    return totals;
  }

  void ascend_(cases::Bucket<K>& bucket, const Options& o, double total) {
    in_every_order(bucket, {3}, [&](unsigned blocks, Order order) {
      int64_t climbed = 0;
      const DeviceProblem p = problem(bucket, o, true);
      // From where a CUDA graph reads it, and as an argument: the same bits.
      const int64_t number = kNumber, *at = blocks % 2 ? &number : nullptr;
      const int64_t given = at ? kNumber + 1 : kNumber;
      launch(blocks, order, [&] {
        switch (o.ascent) {
          case AscentId::kFriendlySam:
            return ascend_kernel<FriendlySam, S>(p, &total, &climbed, at, given);
          case AscentId::kVassoSam:
            return ascend_kernel<VassoSam, S>(p, &total, &climbed, at, given);
          default:
            return ascend_kernel<Sam, S>(p, &total, &climbed, at, given);
        }
      });
      EXPECT(climbed == kNumber, "the climb's number is %ld", long(climbed));
      return 0.0;
    });
  }

  double update_(cases::Bucket<K>& bucket, const Options& o, bool skip) {
    return in_every_order(bucket, {3}, [&](unsigned blocks, Order order) {
      DeviceProblem p = problem(bucket, o, false);
      const T scale = T(o.grad_scale);
      const T* grad_scale = o.grad_scale == 1 ? nullptr : &scale;
      const float found = skip ? 2.0f : 0.0f;
      const float* found_inf = skip || o.rule != RuleId::kRmsProp ? &found : nullptr;
      unsigned ticket = 0;
      int64_t climbed = 7;
      std::vector<double> partials(kPartials, NAN);
      double total = o.follows ? NAN : 0.0;
      p.partials = partials.data();
      p.total = o.follows ? &total : nullptr;
      launch(blocks, order, [&] {
        switch (o.rule) {
          case RuleId::kSgd:
            return update<Sgd>(p, grad_scale, found_inf, &ticket, &climbed);
          case RuleId::kAdam:
            return update<Adam>(p, grad_scale, found_inf, &ticket, &climbed);
          case RuleId::kRmsProp:
            return update<RmsProp>(p, grad_scale, found_inf, &ticket, &climbed);
        }
      });
      EXPECT(ticket == 0, "the ticket is %u afterwards", ticket);
      EXPECT(climbed == 0, "the climb's number is %ld afterwards", long(climbed));
      return std::isnan(total) ? 0.0 : total;
    });
  }

  void restore_(cases::Bucket<K>& bucket, const Options& o) {
    in_every_order(bucket, {3}, [&](unsigned blocks, Order order) {
      DeviceProblem p = problem(bucket, o, false);
      p.grads = nullptr;
      int64_t climbed = 7;
      launch(blocks, order, [&] { restore_kernel<S>(p, &climbed); });
      EXPECT(climbed == 0, "the climb's number is %ld afterwards", long(climbed));
      return 0.0;
    });
  }

 private:
  template <typename Rule, typename... Arguments>
  static void update(const DeviceProblem& p, Arguments... arguments) {
    if constexpr (Rule::kMomentum >= 0) {
      if (p.total) return update_kernel<Rule, S, false, true>(p, arguments...);
    }
    if (p.after) return update_kernel<Rule, S, true>(p, arguments...);
    update_kernel<Rule, S, false>(p, arguments...);
  }

  template <typename F>
  static void launch(unsigned blocks, Order order, const F& kernel) {
    emulation::Machine::get().launch(blocks, kThreads, order, kernel);
  }

  // Whatever the grid and the order of threads and blocks, the bits are the same. The grids, which
  // follow one of 2 blocks, are never larger than the work, as in launch.cu.
  template <typename F>
  double in_every_order(cases::Bucket<K>& bucket, std::initializer_list<unsigned> grids,
                        const F& run, bool wide = false) {
    make_chunks(bucket);
    const auto before = bucket.copy();
    const double result = run(2, Order::kForward);
    const auto first = bucket.copy();
    for (unsigned blocks : grids) {
      put_back(bucket, before);
      const double again = run(blocks, Order::kShuffled);
      // float64 has no wider type for its partial sums: there the grid decides how they round.
      const bool exact = blocks == 2 || (sizeof(T) == 4 && !wide);
      const double slack = exact ? 0 : 4 * kRound<double> * std::fabs(result);
      EXPECT(std::fabs(again - result) <= slack, "%u blocks: %.17g, not %.17g", blocks, again,
             result);
      expect_same(first, bucket.copy());
    }
    return result;
  }

  static void put_back(cases::Bucket<K>& bucket, const typename cases::Bucket<K>::Copy& copy) {
    for (size_t i = 0; i < copy.weights.size(); ++i) {
      std::copy(copy.weights[i].begin(), copy.weights[i].end(), bucket.weights_of(i));
    }
    std::copy(copy.saved.begin(), copy.saved.end(), bucket.saved);
    std::copy(copy.kept.begin(), copy.kept.end(), bucket.kept);
    std::copy(copy.average.begin(), copy.average.end(), bucket.average);
    std::copy(copy.direction.begin(), copy.direction.end(), bucket.direction);
    for (int k = 0; k < 3; ++k) {
      std::copy(copy.states[k].begin(), copy.states[k].end(), bucket.states[k]);
    }
    bucket.step = copy.step;
  }

  static void expect_same(const typename cases::Bucket<K>::Copy& a,
                          const typename cases::Bucket<K>::Copy& b) {
    const auto same = [](const std::vector<S>& x, const std::vector<S>& y) {
      return std::memcmp(x.data(), y.data(), x.size() * sizeof(S)) == 0;
    };
    for (size_t i = 0; i < a.weights.size(); ++i) {
      EXPECT(a.weights[i].empty() || same(a.weights[i], b.weights[i]), "slot %zu differs", i);
    }
    EXPECT(same(a.saved, b.saved), "saved differs");
    EXPECT(same(a.kept, b.kept), "kept differs");
    EXPECT(!std::memcmp(a.average.data(), b.average.data(), a.average.size() * sizeof(T)),
           "the average differs");
    EXPECT(!std::memcmp(a.direction.data(), b.direction.data(), a.direction.size() * sizeof(T)),
           "the direction differs");
    for (int k = 0; k < 3; ++k) EXPECT(same(a.states[k], b.states[k]), "state %d differs", k);
    EXPECT(a.step == b.step, "step differs");
  }

  void make_chunks(const cases::Bucket<K>& bucket) {
    chunks_.clear();
    for (size_t i = 0; i < bucket.slots.size(); ++i) {
      for (int64_t offset = 0; offset < bucket.slots[i].numel; offset += kChunk) {
        chunks_.push_back({static_cast<int64_t>(i), offset});
      }
    }
  }

  // ascent: whether it is for that; else for the rule.
  DeviceProblem problem(cases::Bucket<K>& bucket, const Options& o, bool ascent) {
    hyper_.emplace(o);
    flags_ = bucket.bits(o);
    DeviceProblem p = {};
    p.saved = bucket.saved;
    p.kept = o.blends() ? bucket.kept : nullptr;
    p.average = o.averages() ? bucket.average : nullptr;
    p.direction = o.looks ? bucket.direction : nullptr;
    p.numbers = kNumbers;
    p.blend_hyper = hyper_->of_blend(o);
    p.blend = o.blend();
    loss_scale_ = o.grad_scale;
    p.loss_scale = &loss_scale_;
    p.after = o.weight >= 0 || o.looks;
    bucket.give_states(p.states, o);
    p.step = o.rule == RuleId::kSgd ? nullptr : bucket.step.data();
    p.slots = bucket.slots.data();
    p.chunks = chunks_.data();
    p.grads = bucket.addresses.data();
    p.flags = flags_.data();
    p.hyper = ascent ? hyper_->of(o.norm()) : hyper_->of(o.rule);
    p.decay = o.follows ? hyper_->decay : nullptr;
    p.num_slots = static_cast<int>(bucket.slots.size());
    p.num_chunks = static_cast<int>(chunks_.size());
    return p;
  }

  std::optional<Hyper<T>> hyper_;
  std::vector<int32_t> flags_;
  double loss_scale_ = 1;
  std::vector<Chunk> chunks_;
};

}  // namespace

// With "misaligned" every slot claims to be aligned: the sanitizer must end the program.
int main(int argc, char**) {
  if (argc > 1) {
    cases::Bucket<Kinds<float>> bucket({1030, 77, 77, 77, 77, 77}, 1);
    for (int32_t& flags : bucket.flags) flags |= kAligned;
    Runner<Kinds<float>>().ascend_(bucket, all_options()[0], 9.0);
    return 0;
  }
  // Around the width of an access, of a block's stride, and of a chunk.
  return cases::run_dtypes<Runner>({5, 1, 64, 1025, 0, 3, 4096, 2 * 4096 + 7, 16, 257, 1030, 77});
}
