// What kernels of the simulated device have in common.
#pragma once

#include <ATen/core/Tensor.h>

#include <unordered_map>

#include "backend.h"

namespace simulated {

// CPU tensors over the memory of device tensors, which they do not keep alive: as kernels see it.
class HostViews {
 public:
  at::Tensor of(const at::Tensor& tensor);

 private:
  std::unordered_map<const c10::StorageImpl*, c10::Storage> storages_;
};

at::Tensor host_view(const at::Tensor& tensor);
Stream& stream_of(const at::Tensor& tensor);  // this thread's, on the tensor's device
at::Tensor empty_on(int device, at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype);

// While CPU kernels run for the device: below autograd, Python modes and autocast.
struct KernelScope {
  KernelScope();

 private:
  c10::impl::ExcludeDispatchKeyGuard exclude_;
};

}  // namespace simulated
