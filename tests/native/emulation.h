// CUDA on a CPU, as far as csrc/cuda/kernels.cuh uses it: threads are fibres of one thread. A block
// runs until all its threads have finished; then comes the next one.
// So __shared__ can be static, and a missing barrier shows when threads run in another order.
#pragma once

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct alignas(8) uint2 {
  uint32_t x, y;
};

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, gridDim;

namespace emulation {

// A place to go on from, on a stack of its own.
#if defined(__x86_64__)
// ucontext asks the system for the signal mask at each switch, which is most of a run's time.
struct Context {
  void* stack_pointer = nullptr;

  void prepare(char* stack, size_t size, void (*entry)()) {
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + size) & ~15ull);
    top -= 3;  // the entry finds the stack aligned as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer = top;
  }
};

extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.globl emulation_switch
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

inline void switch_to(Context& from, Context& to) {
  emulation_switch(&from.stack_pointer, to.stack_pointer);
}
#else
struct Context {
  ucontext_t context;

  void prepare(char* stack, size_t size, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
};

inline void switch_to(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

enum class State { kReady, kWarp, kBlock, kDone };
enum class Order { kForward, kShuffled };

constexpr unsigned kWarpSize = 32;
constexpr size_t kStack = 64 << 10;

struct Fibre {
  Context context;
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;
  State state = State::kReady;
  unsigned block, thread;
};

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s\n", what);
  std::abort();
}

class Machine {
 public:
  static Machine& get() {
    static Machine machine;
    return machine;
  }

  template <typename F>
  void launch(unsigned blocks, unsigned threads, Order order, const F& kernel) {
    body_ = kernel;
    gridDim.x = blocks;
    while (fibres_.size() < blocks * threads) {
      fibres_.push_back(std::make_unique<Fibre>());
      fibres_.back()->stack.reset(new char[kStack]);
    }
    for (unsigned i = 0; i < blocks * threads; ++i) {
      Fibre& fibre = *fibres_[i];
      fibre.block = i / threads;
      fibre.thread = i % threads;
      fibre.state = State::kReady;
      fibre.fake_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
      ASAN_UNPOISON_MEMORY_REGION(fibre.stack.get(), kStack);  // frames of the last launch
#endif
      fibre.context.prepare(fibre.stack.get(), kStack, &Machine::enter);
    }
    std::vector<unsigned> turn(threads);  // of the threads in their block
    std::iota(turn.begin(), turn.end(), 0u);
    if (order == Order::kShuffled) std::shuffle(turn.begin(), turn.end(), std::mt19937(7));
    for (unsigned block = 0; block < blocks; ++block) {
      // The first block must not always be the first to come, nor the last one the last.
      run_block(order == Order::kForward ? block : blocks - 1 - block, threads, turn);
    }
  }

  void wait(State state) {
    current_->state = state;
    leave(false);
  }

  template <typename T>
  T shuffle_xor(T value, unsigned lane_mask) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles move 64 bits at most");
    const unsigned lane = current_->thread % kWarpSize, warp = current_->thread / kWarpSize;
    std::memcpy(&exchange_[warp][lane], &value, sizeof(T));
    wait(State::kWarp);
    T other;
    std::memcpy(&other, &exchange_[warp][lane ^ lane_mask], sizeof(T));
    wait(State::kWarp);
    return other;
  }

 private:
  static void enter() {
    Machine& machine = get();
    machine.arrived();
    machine.body_();
    machine.current_->state = State::kDone;
    machine.leave(true);
  }

  void run_block(unsigned block, unsigned threads, const std::vector<unsigned>& turn) {
    const unsigned first = block * threads;
    exchange_.assign(threads / kWarpSize, std::vector<uint64_t>(kWarpSize));
    for (;;) {
      bool ran = false;
      for (unsigned thread : turn) {
        Fibre& fibre = *fibres_[first + thread];
        if (fibre.state != State::kReady) continue;
        ran = true;
        resume(fibre);
      }
      for (unsigned warp = 0; warp < threads; warp += kWarpSize) {
        release(first + warp, first + warp + kWarpSize, State::kWarp);
      }
      release(first, first + threads, State::kBlock);
      if (ran) continue;
      for (unsigned i = first; i < first + threads; ++i) {
        const State state = fibres_[i]->state;
        if (state == State::kReady) goto again;
        if (state == State::kWarp || state == State::kBlock) {
          fail("threads wait at a barrier that others have left or never reach");
        }
      }
      return;
    again:;
    }
  }

  // Lets the threads [begin, end) go on if all of them wait in `state`.
  void release(unsigned begin, unsigned end, State state) {
    for (unsigned i = begin; i < end; ++i) {
      if (fibres_[i]->state != state) return;
    }
    for (unsigned i = begin; i < end; ++i) fibres_[i]->state = State::kReady;
  }

  void resume(Fibre& fibre) {
    current_ = &fibre;
    threadIdx.x = fibre.thread;
    blockIdx.x = fibre.block;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_stack_, fibre.stack.get(), kStack);
#endif
    switch_to(scheduler_, fibre.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

  void leave(bool for_ever) {
    Fibre& fibre = *current_;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &fibre.fake_stack, bottom_, size_);
#endif
    (void)for_ever;
    switch_to(fibre.context, scheduler_);
    arrived();
  }

  void arrived() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(current_->fake_stack, &bottom_, &size_);
#endif
  }

  std::function<void()> body_;
  std::vector<std::unique_ptr<Fibre>> fibres_;
  std::vector<std::vector<uint64_t>> exchange_;
  Context scheduler_;
  Fibre* current_ = nullptr;
  void* fake_stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
};

}  // namespace emulation

inline void __syncthreads() { emulation::Machine::get().wait(emulation::State::kBlock); }
inline void __threadfence() {}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lane_mask) {
  return emulation::Machine::get().shuffle_xor(value, static_cast<unsigned>(lane_mask));
}

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned old = *address;
  *address += value;
  return old;
}
