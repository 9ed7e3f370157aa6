// Operations that make, view, resize and copy tensors of the simulated device.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "kernels.h"

namespace simulated {

using at::IntArrayRef;
using at::Tensor;

KernelScope::KernelScope()
    : exclude_(c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset |
               c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot,
                                    c10::DispatchKey::FuncTorchDynamicLayerFrontMode})) {
  // Whichever thread an operation runs on: how many share a product changes how it is rounded.
  thread_local bool is_alone = (at::set_num_threads(1), true);
  (void)is_alone;
}

Tensor HostViews::of(const Tensor& tensor) {
  const c10::Storage& storage = tensor.storage();
  auto found = storages_.find(storage.unsafeGetStorageImpl());
  if (found == storages_.end()) {
    void* view = storage.data() ? memory(tensor.get_device()).host_view(storage.data()) : nullptr;
    c10::Storage alias(c10::Storage::use_byte_size_t(), storage.nbytes(),
                       c10::DataPtr(view, c10::Device(c10::DeviceType::CPU)), nullptr, false);
    found = storages_.emplace(storage.unsafeGetStorageImpl(), alias).first;
  }
  Tensor result = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(found->second), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return result;
}

Tensor host_view(const Tensor& tensor) { return HostViews().of(tensor); }

Stream& stream_of(const Tensor& tensor) { return current_stream(tensor.get_device()); }

Tensor empty_on(int device, IntArrayRef sizes, IntArrayRef strides, at::ScalarType dtype) {
  c10::DeviceGuard guard({c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device)});
  return Tensor(at::detail::empty_strided_generic(sizes, strides, c10::GetAllocator(c10::DeviceType::CUDA),
                                                  c10::DispatchKeySet(c10::DispatchKey::CUDA), dtype));
}

namespace {

int index_of(std::optional<c10::Device> device) {
  return device.has_value() && device->has_index() ? device->index() : current_device();
}

Tensor empty(IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<c10::Device> device, std::optional<bool> pin_memory,
             std::optional<at::MemoryFormat> memory_format) {
  TORCH_CHECK(!pin_memory.value_or(false), "Only dense CPU tensors can be pinned");
  int index = index_of(device);
  as_torch([&] { memory(index); });
  c10::DeviceGuard guard({c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(index)});
  return Tensor(at::detail::empty_generic(size, c10::GetAllocator(c10::DeviceType::CUDA),
                                          c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                          dtype.value_or(c10::typeMetaToScalarType(at::get_default_dtype())),
                                          memory_format));
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<c10::Device> device, std::optional<bool>) {
  return empty_on(index_of(device), size, stride,
                  dtype.value_or(c10::typeMetaToScalarType(at::get_default_dtype())));
}

const Tensor& resize_(const Tensor& self, IntArrayRef size, std::optional<at::MemoryFormat> format) {
  size_t needed = (self.storage_offset() + c10::multiply_integers(size)) * self.element_size();
  if (needed > self.storage().nbytes()) {
    c10::DeviceGuard guard(self.device());
    c10::DataPtr grown = c10::GetAllocator(c10::DeviceType::CUDA)->allocate(needed);
    size_t before = self.storage().nbytes();
    if (before) {
      DeviceMemory& all = memory(self.get_device());
      void *to = all.host_view(grown.get()), *from = all.host_view(self.storage().data());
      as_torch([&] { enqueue(stream_of(self), [=] { memcpy(to, from, before); }); });
    }
    self.storage().set_data_ptr_noswap(std::move(grown));
    self.storage().set_nbytes(needed);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  if (format.has_value()) self.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  return self;
}

double copy_microseconds(const Tensor& tensor, double bytes_per_s) {
  return 5 + tensor.numel() * tensor.element_size() / bytes_per_s * 1e6;
}

constexpr double kLinkBytesPerS = 25e9, kMemoryBytesPerS = 500e9;

void copy_on_device(const Tensor& to, const Tensor& from, Stream& stream) {
  Tensor target = host_view(to), source = host_view(from);
  as_torch([&] {
    enqueue(stream, [target, source] { KernelScope scope; Tensor(target).copy_(source); },
            copy_microseconds(to, kMemoryBytesPerS));
  });
}

void copy_between_devices(const Tensor& to, const Tensor& from) {
  Stream &sender = stream_of(from), &receiver = stream_of(to);
  Event ready, done;
  as_torch([&] {
    record(ready, receiver);
    wait(sender, ready);
  });
  copy_on_device(to, from, sender);
  as_torch([&] {
    record(done, sender);
    wait(receiver, done);
  });
}

constexpr const char* kUnpinned =
    "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor is pinned. Please use "
    "tensor.pin_memory() or allocate the tensor with pin_memory=True.";

// What is left to the runtime: equal dtypes, both contiguous.
void transfer(const Tensor& to, const Tensor& from, bool non_blocking) {
  const Tensor &there = to.is_cuda() ? to : from, &here = to.is_cuda() ? from : to;
  Stream& stream = stream_of(there);
  bool pinned = is_pinned(here.const_data_ptr());
  TORCH_CHECK(!is_capturing(stream) || pinned, kUnpinned);
  Tensor view = host_view(there), kept;
  if (to.is_cuda() && !pinned) kept = here.clone();  // the driver takes its bytes before it answers
  if (pinned && !is_capturing(stream)) kept = here.storage().use_count() ? here : Tensor();
  void* address = to.is_cuda() && !pinned ? kept.data_ptr() : here.data_ptr();
  size_t bytes = here.nbytes();
  void *target = to.is_cuda() ? view.data_ptr() : address, *source = to.is_cuda() ? address : view.data_ptr();
  // torch's own pinned memory waits for copies; what the user has locked does not, and is only kept mapped here.
  as_torch([&] {
    enqueue(stream, [=, kept = kept] { memcpy(target, source, bytes); }, copy_microseconds(there, kLinkBytesPerS));
    if (!non_blocking)
      synchronize_operation(stream);
    else if (!pinned && !to.is_cuda())
      synchronize(stream);
  });
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  TORCH_CHECK(source.defined(), "copy_: source is undefined");
  Tensor from = source.expand_as(self);
  if (!self.numel() || self.is_same(source)) return self;
  TORCH_CHECK(self.device().type() != c10::DeviceType::Meta && from.device().type() != c10::DeviceType::Meta,
              "Cannot copy out of meta tensor; no data!");
  if (self.is_cuda() && from.is_cuda()) {
    if (self.device() == from.device()) {
      copy_on_device(self, from, stream_of(self));
    } else if (self.scalar_type() == from.scalar_type() && self.is_non_overlapping_and_dense() &&
               self.strides() == from.strides()) {
      copy_between_devices(self, from);
    } else {
      Tensor ready = from.to(self.scalar_type()).contiguous();
      Tensor there = empty_on(self.get_device(), ready.sizes(), ready.strides(), ready.scalar_type());
      copy_between_devices(there, ready);
      copy_on_device(self, there, stream_of(self));
    }
    return self;
  }
  bool as_it_is = self.scalar_type() == from.scalar_type() && self.is_non_overlapping_and_dense() &&
                  self.strides() == from.strides();
  if (as_it_is) {
    transfer(self, from, non_blocking);
  } else if (self.is_cuda()) {
    Tensor ready = from.to(self.scalar_type()).contiguous();
    if (self.is_contiguous()) {
      transfer(self, ready, non_blocking);
    } else {
      Tensor there = empty_on(self.get_device(), ready.sizes(), ready.strides(), ready.scalar_type());
      transfer(there, ready, non_blocking);
      copy_on_device(self, there, stream_of(self));
    }
  } else {
    Tensor ready = from.to(self.scalar_type()).contiguous();
    if (self.is_contiguous()) {
      transfer(self, ready, non_blocking);
    } else {
      Tensor here = at::empty_like(ready, ready.options().device(c10::DeviceType::CPU));
      transfer(here, ready, false);
      self.copy_(here);
    }
  }
  return self;
}

at::Scalar local_scalar(const Tensor& self) {
  as_torch([&] { synchronize_operation(stream_of(self)); });
  KernelScope scope;
  return at::_local_scalar_dense(host_view(self));
}

void record_stream(Tensor& self, c10::Stream stream) {
  record_use(self.storage().data(), simulated::stream(stream.device_index(), stream.id()));
}

Tensor& set_source_storage(Tensor& self, c10::Storage source, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("resize_", TORCH_FN(resize_));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_source_storage));
  m.impl("set_.source_Tensor", TORCH_FN(at::native::set_tensor_));
  m.impl("copy_", TORCH_FN(copy_));
  m.impl("_local_scalar_dense", TORCH_FN(local_scalar));
  m.impl("record_stream", TORCH_FN(record_stream));
}

TORCH_LIBRARY(simulated_cuda, m) {
  m.def("init() -> ()", [] { at::globalContext().lazyInitDevice(c10::DeviceType::CUDA); });
  m.def("host_view(Tensor tensor) -> Tensor", [](const Tensor& tensor) { return host_view(tensor); });
}

}  // namespace simulated
