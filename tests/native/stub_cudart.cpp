// A CUDA runtime without a GPU: it launches nothing, and tells what it is asked to launch.
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace {

int device = 0;
std::string launches;

std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> names;
  return names;
}

struct Size {
  unsigned x, y, z;
};

}  // namespace

extern "C" {

int stub_device() { return device; }
void stub_set_device(int to) { device = to; }
const char* stub_launches() { return launches.c_str(); }

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const void* kernel, char*, const char* name, int, void*, void*,
                            void*, void*, int*) {
  names()[kernel] = name;
}
// What the kernels' host sides would call if they were launched with <<<>>>.
int __cudaGetKernel(void**, const void*) { return 0; }
int __cudaLaunchKernel(void*, Size, Size, void**, size_t, void*) { return 0; }
int __cudaPopCallConfiguration(Size*, Size*, size_t*, void*) { return 0; }

int cudaDeviceGetAttribute(int* value, int, int) {
  *value = 132;
  return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 2;
  return 0;
}
const char* cudaGetErrorString(int) { return "an error of the stub"; }
int cudaGetLastError() { return 0; }
int cudaLaunchKernel(const void* kernel, Size grid, Size block, void**, size_t, void* stream) {
  launches += names().at(kernel) + " grid " + std::to_string(grid.x) + " block " +
              std::to_string(block.x) + " device " + std::to_string(device) + " stream " +
              std::to_string(reinterpret_cast<uintptr_t>(stream)) + "\n";
  return 0;
}

}  // extern "C"
