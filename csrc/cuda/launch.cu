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

}  // namespace

const char* launch_sq_norm(Dtype dtype, const DeviceProblem& p, void* partials, bool by_group,
                           int device, void* stream) {
  return with_storage(dtype, [&](auto s) {
    using T = ComputeOf<decltype(s)>;
    return launch(sq_norm_kernel<decltype(s)>, p.num_chunks, device, stream, p,
                  static_cast<T*>(partials), by_group);
  });
}

const char* launch_perturb_(Dtype dtype, const DeviceProblem& p, const void* sq_norm,
                            int64_t num_partials, int device, void* stream) {
  return with_storage(dtype, [&](auto s) {
    using T = ComputeOf<decltype(s)>;
    return launch(perturb_kernel<decltype(s)>, p.num_chunks, device, stream, p,
                  static_cast<const T*>(sq_norm), num_partials);
  });
}

const char* launch_update_(Dtype dtype, RuleId rule, const DeviceProblem& p, const void* grad_scale,
                           const float* found_inf, unsigned* ticket, int device, void* stream) {
  return with_storage(dtype, [&](auto s) {
    using S = decltype(s);
    const auto scale = static_cast<const ComputeOf<S>*>(grad_scale);
    const auto with =
        [&](void (*kernel)(DeviceProblem, const ComputeOf<S>*, const float*, unsigned*)) {
          return launch(kernel, p.num_chunks, device, stream, p, scale, found_inf, ticket);
        };
    switch (rule) {
      case RuleId::kSgd:
        return with(update_kernel<Sgd, S>);
      case RuleId::kAdam:
        return with(update_kernel<Adam, S>);
      case RuleId::kRmsProp:
        return with(update_kernel<RmsProp, S>);
    }
    return "unknown rule";
  });
}

}  // namespace fused_sam
