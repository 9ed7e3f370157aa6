// Every other operation: checked as CUDA checks it, its results' shapes from torch's meta kernels, and when its turn
// comes on the stream, computed by the CPU kernel on the same memory.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <set>

#include "kernels.h"

namespace simulated {

namespace {

using at::Tensor;
using c10::IValue;
using torch::jit::Stack;

template <typename Call>
void for_each_tensor(const IValue& value, Call call) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) call(value.toTensor());
  } else if (value.isTensorList()) {
    for (const Tensor& each : value.toTensorList())
      if (each.defined()) call(each);
  } else if (value.isOptionalTensorList()) {
    for (const std::optional<Tensor>& each : value.toOptionalTensorList())
      if (each.has_value() && each->defined()) call(*each);
  }
}

template <typename Call>
IValue map_tensors(const IValue& value, Call call) {
  auto mapped = [&](const Tensor& tensor) { return tensor.defined() ? call(tensor) : tensor; };
  if (value.isTensor()) return mapped(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> result;
    for (const Tensor& each : value.toTensorList()) result.push_back(mapped(each));
    return result;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> result;
    for (const std::optional<Tensor>& each : value.toOptionalTensorList())
      result.push_back(each.has_value() ? std::optional<Tensor>(mapped(*each)) : std::nullopt);
    return result;
  }
  return value;
}

bool is_one_of(const std::set<std::string>& names, const c10::OperatorHandle& op) {
  return names.count(op.operator_name().name) > 0;
}

// Those whose results the host has to wait for on a GPU too.
bool waits_for_device(const c10::OperatorHandle& op, const std::vector<IValue>& args) {
  static const std::set<std::string> names{
      "aten::nonzero",   "aten::masked_select", "aten::equal",   "aten::_unique",          "aten::_unique2",
      "aten::unique_dim", "aten::unique_consecutive", "aten::bincount", "aten::is_set_to"};
  if (is_one_of(names, op)) return true;
  if (op.operator_name().name == "aten::repeat_interleave" && op.operator_name().overload_name == "Tensor")
    return args.at(1).isNone();
  static const std::set<std::string> indexing{"aten::index", "aten::index_put_", "aten::_index_put_impl_",
                                              "aten::index_put"};
  if (!is_one_of(indexing, op)) return false;
  bool masks = false;
  for_each_tensor(args.at(1), [&](const Tensor& index) {
    masks |= index.scalar_type() == at::kBool || index.scalar_type() == at::kByte;
  });
  if (masks && args.size() > 2 && args[2].isTensor() && args[2].toTensor().numel() == 1) return false;  // masked_fill
  return masks;
}

bool takes_indices_of_the_cpu(const c10::OperatorHandle& op) {
  static const std::set<std::string> names{"aten::index", "aten::index_put_", "aten::_index_put_impl_",
                                           "aten::index_put"};
  return is_one_of(names, op);
}

// Kernels that are not pointwise ask for tensors of one device, 0-dimensional ones too.
bool takes_scalars_of_the_cpu(const c10::OperatorHandle& op) {
  static const std::set<std::string> names{"aten::index_select", "aten::gather",    "aten::embedding",
                                           "aten::scatter",      "aten::scatter_",  "aten::index_add",
                                           "aten::index_add_",   "aten::index_copy", "aten::index_copy_",
                                           "aten::cat",          "aten::scatter_add_"};
  return !is_one_of(names, op);
}

// Products that CUDA has for floating-point numbers alone.
void check_dtypes(const c10::OperatorHandle& op, const std::vector<IValue>& args) {
  static const std::set<std::string> products{"aten::mm",     "aten::addmm",    "aten::bmm", "aten::baddbmm",
                                              "aten::addmv",  "aten::addmm_",   "aten::dot", "aten::addmv_",
                                              "aten::addbmm", "aten::baddbmm_", "aten::vdot"};
  if (!is_one_of(products, op)) return;
  const Tensor& first = args.at(0).toTensor();
  TORCH_CHECK_NOT_IMPLEMENTED(!at::isIntegralType(first.scalar_type(), true), "\"addmm_cuda\" not implemented for '",
                              first.scalar_type(), "'");
}

// The device that the operation runs on, after what CUDA would refuse was refused.
int common_device(const c10::OperatorHandle& op, std::vector<IValue>& args) {
  std::optional<c10::Device> device;
  const Tensor* stranger = nullptr;
  for (size_t idx = 0; idx < args.size(); ++idx) {
    for_each_tensor(args[idx], [&](const Tensor& tensor) {
      if (tensor.is_cuda()) {
        TORCH_CHECK(!device.has_value() || *device == tensor.device(),
                    "Expected all tensors to be on the same device, but found at least two devices, ", *device, " and ",
                    tensor.device(), "! (when checking argument in method ", op.operator_name().name, ")");
        device = tensor.device();
      }
    });
  }
  for (IValue& arg : args) {
    if (arg.isDevice()) {
      if (!device.has_value())
        device = arg.toDevice().has_index() ? arg.toDevice()
                                            : c10::Device(c10::DeviceType::CUDA, (c10::DeviceIndex)current_device());
      arg = c10::Device(c10::DeviceType::CPU);
    }
  }
  TORCH_CHECK(device.has_value(), "no tensor and no device in a call of ", op.operator_name().name);
  for (size_t idx = 0; idx < args.size(); ++idx) {
    if (idx && takes_indices_of_the_cpu(op) && !args[idx].isTensor()) {
      args[idx] = map_tensors(args[idx], [&](const Tensor& index) { return index.to(*device); });
      continue;
    }
    for_each_tensor(args[idx], [&](const Tensor& tensor) {
      bool scalar = tensor.dim() == 0 && tensor.device().is_cpu() && takes_scalars_of_the_cpu(op);
      if (!tensor.is_cuda() && !scalar) stranger = &tensor;
      TORCH_CHECK(!stranger, "Expected all tensors to be on the same device, but found at least two devices, ", *device,
                  " and ", tensor.device(), "! (when checking argument in method ", op.operator_name().name, ")");
    });
  }
  return device->index();
}

Tensor with_wrapped_number(Tensor result, const Tensor& like) {
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) result.unsafeGetTensorImpl()->set_wrapped_number(true);
  return result;
}

Tensor as_meta(const Tensor& tensor) {
  if (tensor.dim() == 0 && tensor.device().is_cpu()) return tensor;  // allowed beside tensors of any device
  Tensor result = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(c10::DeviceType::Meta));
  return with_wrapped_number(result, tensor);
}

// One call, on its way to the CPU's kernel.
class Call {
 public:
  Call(const c10::OperatorHandle& op, Stack* stack) : op_(op), schema_(op.schema()), stack_(stack) {
    args_ = torch::jit::last(*stack, schema_.arguments().size()).vec();
    torch::jit::drop(*stack, schema_.arguments().size());
  }

  void dispatch() {
    check_dtypes(op_, args_);
    device_ = common_device(op_, args_);
    TORCH_CHECK_NOT_IMPLEMENTED(
        op_.hasComputedKernelForDispatchKey(c10::DispatchKey::CPU) &&
            op_.operator_name().name.find("_for_cpu") == std::string::npos &&
            op_.operator_name().name.find("mkldnn") == std::string::npos,
        "Could not run '", op_.operator_name(), "' with arguments from the 'CUDA' backend.");
    if (returns_views()) {
      push_views();
    } else if (waits_for_device(op_, args_)) {
      run_now();
    } else if (!infer()) {
      is_capturing(stream()) ? infer_from_zeros() : run_now();
    }
  }

 private:
  Stream& stream() const { return current_stream(device_); }

  bool returns_views() const {
    for (const auto& each : schema_.returns())
      if (each.alias_info() && !each.alias_info()->isWrite()) return true;
    return false;
  }

  bool is_written(size_t idx) const {
    const auto* alias = schema_.arguments()[idx].alias_info();
    return alias && alias->isWrite();
  }

  // Whether nothing is new: its results are its arguments, which have their shapes. If they have not, running tells.
  bool writes_alone() const {
    bool any = false;
    for (size_t idx = 0; idx < args_.size(); ++idx) {
      if (!is_written(idx)) continue;
      if (!args_[idx].isTensor() || !args_[idx].toTensor().numel()) return false;
      any = true;
    }
    for (size_t idx = 0; idx < schema_.returns().size(); ++idx) any &= argument_of(idx) >= 0;
    return any;
  }

  // The argument that a return is; -1 if it is new.
  int argument_of(size_t return_idx) const {
    const auto* alias = schema_.returns()[return_idx].alias_info();
    if (!alias || !alias->isWrite()) return -1;
    for (size_t idx = 0; idx < args_.size(); ++idx)
      if (is_written(idx) && schema_.arguments()[idx].alias_info()->beforeSets() == alias->beforeSets()) return idx;
    return -1;
  }

  // The arguments as the CPU's kernel takes them later: over the same memory, scalars as they are now.
  std::vector<IValue> host_args() const {
    HostViews views;
    std::vector<IValue> result;
    for (size_t idx = 0; idx < args_.size(); ++idx) {
      result.push_back(map_tensors(args_[idx], [&](const Tensor& tensor) {
        return tensor.is_cuda() ? with_wrapped_number(views.of(tensor), tensor)
                                : with_wrapped_number(tensor.clone(), tensor);
      }));
      result.back() = with_generator(idx, result.back());
    }
    return result;
  }

  IValue with_generator(size_t idx, const IValue& value) const {
    auto type = schema_.arguments()[idx].type();
    if (auto optional = type->cast<c10::OptionalType>()) type = optional->getElementType();
    if (type->kind() != c10::TypeKind::GeneratorType) return value;
    return cpu_generator(value.isNone() ? std::nullopt : std::optional<at::Generator>(value.toGenerator()), device_);
  }

  static Stack call_on_cpu(const c10::OperatorHandle& op, const std::vector<IValue>& args) {
    KernelScope scope;
    Stack stack(args.begin(), args.end());
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
    return stack;
  }

  void push_views() {
    std::vector<IValue> args = host_args();
    Stack results = call_on_cpu(op_, args);
    for (const IValue& each : results)
      stack_->push_back(map_tensors(each, [&](const Tensor& view) { return as_device_view(view, args); }));
  }

  // A view of the CPU's that lies in some argument's memory, as a tensor of the device.
  Tensor as_device_view(const Tensor& view, const std::vector<IValue>& host) const {
    for (size_t idx = 0; idx < args_.size(); ++idx) {
      if (!args_[idx].isTensor() || !args_[idx].toTensor().is_cuda()) continue;
      if (!host[idx].toTensor().storage().is_alias_of(view.storage())) continue;
      const Tensor& owner = args_[idx].toTensor();
      Tensor result = at::detail::make_tensor<c10::TensorImpl>(
          c10::TensorImpl::VIEW, c10::Storage(owner.storage()), owner.key_set(), view.dtype());
      result.unsafeGetTensorImpl()->set_sizes_and_strides(view.sizes(), view.strides(), view.storage_offset());
      return result;
    }
    TORCH_CHECK(false, op_.operator_name(), " returned a view of none of its arguments");
  }

  void run_now() {
    as_torch([&] { synchronize_operation(stream()); });
    Stack results = call_on_cpu(op_, host_args());
    for (size_t idx = 0; idx < results.size(); ++idx) {
      int argument = argument_of(idx);
      stack_->push_back(argument >= 0 ? args_[argument] : map_tensors(results[idx], [&](const Tensor& result) {
        Tensor there = empty_on(device_, result.sizes(), result.strides(), result.scalar_type());
        Tensor view = host_view(there);
        as_torch([&] { enqueue(stream(), [view, result] { KernelScope scope; Tensor(view).copy_(result); }); });
        return there;
      }));
    }
  }

  // Shapes without values, from the meta kernel; false if there is none, or if it refuses.
  bool infer() {
    if (writes_alone()) {
      launch(args_);
      return true;
    }
    if (!op_.hasKernelForDispatchKey(c10::DispatchKey::Meta)) return false;
    for (const auto& each : schema_.returns())
      if (!each.type()->isSubtypeOf(c10::TensorType::get()) &&
          !each.type()->isSubtypeOf(c10::ListType::ofTensors()))
        return false;
    Stack metas;
    for (const IValue& arg : args_) {
      IValue meta = map_tensors(arg, as_meta);
      metas.push_back(meta.isDevice() ? IValue(c10::Device(c10::DeviceType::Meta)) : meta);
    }
    for (IValue& meta : metas)
      if (meta.isGenerator()) meta = IValue();
    std::vector<IValue> meta_args(metas.begin(), metas.end());
    try {
      KernelScope scope;
      op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::Meta), &metas);
    } catch (const std::exception&) {
      return false;
    }
    for (size_t idx = 0; idx < args_.size(); ++idx)
      if (is_written(idx) && args_[idx].isTensor()) resize_like(args_[idx].toTensor(), meta_args[idx].toTensor());
    launch(std::vector<IValue>(metas.begin(), metas.end()));
    return true;
  }

  static void resize_like(const Tensor& argument, const Tensor& meta) {
    if (argument.sizes() == meta.sizes()) return;
    argument.resize_(meta.sizes());
    if (argument.strides() != meta.strides())
      argument.unsafeGetTensorImpl()->set_sizes_and_strides(meta.sizes(), meta.strides());
  }

  // In a capture nothing may run, and no meta kernel is there to ask: shapes do not depend on values, so ask with zeros.
  void infer_from_zeros() {
    std::vector<IValue> args;
    for (const IValue& arg : host_args()) args.push_back(map_tensors(arg, [](const Tensor& t) { return at::zeros_like(t); }));
    Stack results = call_on_cpu(op_, args);
    launch(std::vector<IValue>(results.begin(), results.end()));
  }

  // Results of the given shapes, filled when the operation's turn comes.
  void launch(const std::vector<IValue>& shapes) {
    std::vector<std::pair<size_t, std::vector<Tensor>>> outputs;
    for (size_t idx = 0; idx < schema_.returns().size(); ++idx) {
      int argument = argument_of(idx);
      if (argument >= 0) {
        stack_->push_back(args_[argument]);
        continue;
      }
      std::vector<Tensor> views;
      stack_->push_back(map_tensors(shapes[idx], [&](const Tensor& shape) {
        Tensor made = empty_on(device_, shape.sizes(), shape.strides(), shape.scalar_type());
        views.push_back(host_view(made));
        return made;
      }));
      outputs.emplace_back(idx, std::move(views));
    }
    std::vector<std::pair<size_t, std::vector<int64_t>>> written;
    for (size_t idx = 0; idx < args_.size(); ++idx)
      if (is_written(idx) && args_[idx].isTensor()) written.emplace_back(idx, args_[idx].toTensor().sizes().vec());
    auto run = [op = op_, args = host_args(), outputs = std::move(outputs), written = std::move(written)] {
      Stack results = call_on_cpu(op, args);
      for (const auto& [idx, sizes] : written)
        TORCH_CHECK(args[idx].toTensor().sizes() == sizes, op.operator_name(), " resized what it writes to");
      KernelScope scope;
      for (const auto& [idx, views] : outputs) {
        auto view = views.begin();
        for_each_tensor(results.at(idx), [&](const Tensor& result) {
          TORCH_CHECK(view->scalar_type() == result.scalar_type(), op.operator_name(), ": the CPU's result is ",
                      result.scalar_type(), ", the meta kernel's ", view->scalar_type());
          Tensor(*view++).copy_(result);
        });
      }
    };
    as_torch([&] {
      enqueue(stream(), std::move(run), 5);
      raise_left_error();
    });
  }

  c10::OperatorHandle op_;
  const c10::FunctionSchema& schema_;
  Stack* stack_;
  std::vector<IValue> args_;
  int device_ = 0;
};

void fallback(const c10::OperatorHandle& op, Stack* stack) { Call(op, stack).dispatch(); }

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

// Of CUDA alone.
Tensor mm_in(const Tensor& self, const Tensor& other, at::ScalarType dtype) {
  return at::mm(self.to(dtype), other.to(dtype));
}

// Composite on CPU and CUDA alike, but its CUDA branches end in kernels that the CPU does not have.
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("mm.dtype", TORCH_FN(mm_in));
  m.impl("convolution", torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

}  // namespace simulated
