// Launches: a persistent grid, as many blocks as the GPU holds at once and no more than the work.
// Nothing here waits, allocates or copies, so all of it can be captured in a CUDA graph.
#include <cuda_runtime.h>

#include <mutex>
#include <type_traits>
#include <unordered_map>

#include "kernels.cuh"

namespace fused_sam {
namespace {

// How many blocks of the kernel a device holds at once. Asked once for each kernel and device.
cudaError_t resident_blocks(const void* kernel, int device, int* blocks) {
  static std::mutex mutex;
  static std::unordered_map<const void*, int> known[64];
  const std::lock_guard<std::mutex> lock(mutex);
  if (device < 0 || device >= 64) return cudaErrorInvalidDevice;
  int& found = known[device][kernel];
  if (!found) {
    int for_each = 0, processors = 0;
    cudaError_t error =
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&for_each, kernel, kThreads, 0);
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    found = for_each * processors;
  }
  *blocks = found;
  return found ? cudaSuccess : cudaErrorInvalidConfiguration;
}

template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), int num_chunks, int device, void* stream,
                   Arguments... arguments) {
  int blocks = 0;
  cudaError_t error = resident_blocks(reinterpret_cast<const void*>(kernel), device, &blocks);
  if (error == cudaSuccess) {
    blocks = blocks < kPartials ? blocks : kPartials;
    blocks = blocks < num_chunks ? blocks : num_chunks;
    void* pointers[] = {static_cast<void*>(&arguments)...};
    error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks ? blocks : 1),
                             dim3(kThreads), pointers, 0, static_cast<cudaStream_t>(stream));
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // the caller reports it; it must not turn up again elsewhere
  return cudaGetErrorString(error);
}

// Calls f(S()) with the storage type of a dtype.
template <typename F>
const char* with_storage(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float());
    case Dtype::kFloat64:
      return f(double());
    case Dtype::kBFloat16:
      return f(BFloat16());
    case Dtype::kFloat16:
      return f(Float16());
  }
  return "unknown dtype";
}

// Calls f(Value()) with the value of a number in one of the lists of mathematics.h.
#define FUSED_SAM_CASE(value) \
  if (index == number++) return f(value());
#define FUSED_SAM_WITH(name, list)               \
  template <typename F>                          \
  const char* name(int64_t index, const F& f) {  \
    int64_t number = 0;                          \
    list(FUSED_SAM_CASE) return "unknown value"; \
  }
FUSED_SAM_WITH(with_sums, FUSED_SAM_SUMS)
FUSED_SAM_WITH(with_ascent, FUSED_SAM_ASCENTS)
FUSED_SAM_WITH(with_rule, FUSED_SAM_RULES)

}  // namespace

const char* launch_reduce(Dtype dtype, int64_t sums, const DeviceProblem& p, double* partials,
                          double* total, unsigned* ticket, int device, void* stream) {
  return with_storage(dtype, [&](auto s) {
    using S = decltype(s);
    return with_sums(sums, [&](auto value) {
      return launch(reduce_kernel<decltype(value), S>, p.num_chunks, device, stream, p, partials,
                    total, ticket);
    });
  });
}

const char* launch_ascend_(Dtype dtype, int64_t ascent, const DeviceProblem& p, const double* total,
                           int64_t* climb, const int64_t* number_at, int64_t number, int device,
                           void* stream) {
  return with_storage(dtype, [&](auto s) {
    using S = decltype(s);
    return with_ascent(ascent, [&](auto value) {
      return launch(ascend_kernel<decltype(value), S>, p.num_chunks, device, stream, p, total,
                    climb, number_at, number);
    });
  });
}

const char* launch_update_(Dtype dtype, int64_t rule, const DeviceProblem& p,
                           const void* grad_scale, const float* found_inf, unsigned* ticket,
                           int64_t* climb, int device, void* stream) {
  return with_storage(dtype, [&](auto s) {
    using S = decltype(s);
    return with_rule(rule, [&](auto value) {
      using Rule = decltype(value);
      auto kernel = p.after ? update_kernel<Rule, S, true> : update_kernel<Rule, S, false>;
      if constexpr (Rule::kMomentum >= 0) {
        if (p.total) kernel = update_kernel<Rule, S, false, true>;
      }
      return launch(kernel, p.num_chunks, device, stream, p,
                    static_cast<const ComputeOf<S>*>(grad_scale), found_inf, ticket, climb);
    });
  });
}

const char* launch_restore_(Dtype dtype, const DeviceProblem& p, int64_t* climb, int device,
                            void* stream) {
  return with_storage(dtype, [&](auto s) {
    return launch(restore_kernel<decltype(s)>, p.num_chunks, device, stream, p, climb);
  });
}

}  // namespace fused_sam
