// What the CUDA library asks of libtorch_cuda, and of torch about devices, where torch is for the
// CPU: all tensors say that they are on the second GPU.
#include <cstdint>

extern "C" {

int stub_device();
void stub_set_device(int to);

int aoti_torch_get_device_index(void*, int32_t* index) {
  *index = 1;
  return 0;
}
int aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = reinterpret_cast<void*>(uintptr_t(70 + device));
  return 0;
}
int aoti_torch_create_device_guard(int32_t device, void** guard) {
  *guard = new int(stub_device());
  stub_set_device(device);
  return 0;
}
int aoti_torch_delete_device_guard(void* guard) {
  stub_set_device(*static_cast<int*>(guard));
  delete static_cast<int*>(guard);
  return 0;
}

}  // extern "C"
