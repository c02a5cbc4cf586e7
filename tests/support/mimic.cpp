// A device that claims to be an accelerator and computes on the CPU, in torch's slot for foreign devices (PrivateUse1).
//
// Every operation without a kernel of its own arrives at `compute`, which refuses tensors on two devices as CUDA does, tells
// Python its name, and runs the CPU's kernel on the same memory. What Python is told beside that: what makes the host wait.
#include <ATen/ATen.h>
#include <ATen/SparseTensorImpl.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/GroupedMMUtils.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <functional>
#include <mutex>
#include <set>

namespace py = pybind11;
using at::Tensor;
using c10::Device, c10::IValue, c10::Stream;
constexpr auto KIND = c10::DeviceType::PrivateUse1;
const Device HERE(KIND, 0);

// -- memory and streams --------------------------------------------------------------------------------------------------
std::set<const void*> pinned;
std::mutex pinning;

template <bool is_pinned>
struct Memory final : c10::Allocator {
  static void release(void* data) {
    if (is_pinned) {
      std::lock_guard lock(pinning);
      pinned.erase(data);
    }
    std::free(data);
  }
  c10::DataPtr allocate(size_t size) override {
    void* data = size ? std::aligned_alloc(256, (size + 255) / 256 * 256) : nullptr;
    if (is_pinned && data) {
      std::lock_guard lock(pinning);
      pinned.insert(data);
    }
    return {data, data, &release, is_pinned ? Device(at::kCPU) : HERE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
};
Memory<false> memory;
Memory<true> host_memory;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return KIND; }
  Device exchangeDevice(Device) const override { return HERE; }
  Device getDevice() const override { return HERE; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, HERE); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, HERE); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &host_memory; }
  bool isPinnedPtr(const void* data) const override {
    std::lock_guard lock(pinning);
    return pinned.count(data) > 0;
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    auto data = memory.allocate(size);
    std::memcpy(data.get(), storage.data(), std::min(size, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(size);
  }
};

// -- what Python is told -------------------------------------------------------------------------------------------------
py::object* listener = nullptr;  // never freed: Python may end first
bool grouped_kernel = true;      // grouped_mm has one kernel for all groups, as on an H100 in bfloat16

void tell(const std::string& what) {
  if (!listener) return;
  py::gil_scoped_acquire gil;
  (*listener)(what);
}

// -- the same memory, seen from the other side ---------------------------------------------------------------------------
at::SparseTensorImpl* sparse(const Tensor& t) { return static_cast<at::SparseTensorImpl*>(t.unsafeGetTensorImpl()); }

Tensor seen_from(Device device, const Tensor& t) {
  const bool cpu = device.is_cpu();
  if (t.is_sparse()) {
    auto key = cpu ? c10::DispatchKey::SparseCPU : c10::DispatchKey::SparsePrivateUse1;
    auto made = at::detail::make_tensor<at::SparseTensorImpl>(c10::DispatchKeySet(key), t.dtype());
    auto *from = sparse(t), *to = sparse(made);
    to->resize_(from->sparse_dim(), from->dense_dim(), t.sizes());
    to->set_indices_and_values_unsafe(seen_from(device, from->indices()), seen_from(device, from->values()));
    to->set_coalesced(from->coalesced());
    return made;
  }
  auto* owner = new c10::Storage(t.storage());
  auto drop = [](void* storage) { delete static_cast<c10::Storage*>(storage); };
  c10::DataPtr data(owner->unsafeGetStorageImpl()->mutable_data(), owner, drop, device);
  auto* allocator = cpu ? c10::GetCPUAllocator() : static_cast<c10::Allocator*>(&memory);
  c10::Storage storage(c10::Storage::use_byte_size_t(), owner->nbytes(), std::move(data), allocator, true);
  auto key = cpu ? c10::DispatchKey::CPU : c10::DispatchKey::PrivateUse1;
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), t.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return made;
}

void take_over(const Tensor& t, const Tensor& cpu) {  // what a kernel has resized or rebuilt
  if (t.is_sparse()) {
    auto *from = sparse(cpu), *to = sparse(t);
    to->resize_(from->sparse_dim(), from->dense_dim(), cpu.sizes());
    to->set_indices_and_values_unsafe(seen_from(HERE, from->indices()), seen_from(HERE, from->values()));
    to->set_coalesced(from->coalesced());
  } else if (cpu.const_data_ptr() != t.const_data_ptr() || cpu.sizes() != t.sizes() || cpu.strides() != t.strides()) {
    t.unsafeGetTensorImpl()->set_storage_keep_dtype(seen_from(HERE, cpu).storage());
    t.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
  }
}

IValue each(const IValue& value, const std::function<Tensor(const Tensor&)>& change) {
  auto changed = [&](const Tensor& t) { return t.defined() ? change(t) : t; };
  if (value.isTensor()) return changed(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& t : value.toTensorVector()) list.push_back(changed(t));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const auto& t : value.toOptionalTensorVector()) list.push_back(t ? std::optional(changed(*t)) : std::nullopt);
    return list;
  }
  return value.isDevice() ? IValue(Device(at::kCPU)) : value;
}

void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string name = schema.name();
  const size_t first = stack->size() - schema.arguments().size();
  // -- refuse what CUDA refuses: of the host's tensors only numbers may meet the device's, and indices, which wait for a copy
  const bool indexes = name.find("aten::index") == 0 || name.find("_index") != std::string::npos;
  const bool is_fused = name.find("_fused") != std::string::npos;
  bool any_here = false, any_there = false;
  for (size_t place = first; place < stack->size(); ++place)
    each((*stack)[place], [&](const Tensor& t) {
      const bool is_index = indexes && (*stack)[place].isOptionalTensorList();
      if (is_index && t.scalar_type() == at::kBool) tell("wait: mask");
      if (t.device() == HERE) any_here = true;
      else if (is_index) tell("wait: indices on the host");
      else if (t.numel() && (t.dim() || is_fused)) any_there = true;
      return t;
    });
  TORCH_CHECK(!(any_here && any_there), "Expected all tensors to be on the same device, but found two, in ", name);
  tell(schema.overload_name().empty() ? name : name + "." + schema.overload_name());
  // -- compute
  std::vector<std::pair<Tensor, Tensor>> pairs;
  for (size_t place = first; place < stack->size(); ++place)
    (*stack)[place] = each((*stack)[place], [&](const Tensor& t) {
      if (t.device() != HERE) return t;
      for (const auto& pair : pairs) if (pair.first.is_same(t)) return pair.second;
      pairs.emplace_back(t, seen_from(at::kCPU, t));
      return pairs.back().second;
    });
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(stack);
  }
  for (const auto& [t, cpu] : pairs) take_over(t, cpu);
  for (size_t place = stack->size() - schema.returns().size(); place < stack->size(); ++place)
    (*stack)[place] = each((*stack)[place], [&](const Tensor& t) {
      for (const auto& pair : pairs) if (pair.second.is_same(t)) return pair.first;
      return t.device() == HERE ? t : seen_from(HERE, t);
    });
}

// -- kernels of its own --------------------------------------------------------------------------------------------------
using Ints = c10::IntArrayRef;
using Dtype = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using Place = std::optional<Device>;
using Flag = std::optional<bool>;

Tensor empty_strided(Ints size, Ints stride, Dtype dtype, Layout, Place, Flag) {
  auto type = c10::scalarTypeToTypeMeta(c10::dtype_or_default(dtype));
  int64_t bytes = at::detail::computeStorageNbytes(size, stride, type.itemsize());
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, memory.allocate(bytes), &memory, true);
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), type);
  made.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return made;
}
Tensor empty(Ints size, Dtype dtype, Layout, Place, Flag, std::optional<at::MemoryFormat>) {
  return empty_strided(size, c10::contiguous_strides(size), dtype, {}, {}, {});
}
Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  const bool up = from.device() != HERE, down = to.device() != HERE;
  if (from.numel()) {
    if (down) tell("wait: copy to the host");
    else if (up && from.is_pinned() && non_blocking) tell("copy to the device");
    else if (up) tell("wait: copy to the device");
    else tell("aten::copy_");
  }
  at::AutoDispatchBelowADInplaceOrView below;
  (down ? to : seen_from(at::kCPU, to)).copy_(up ? from : seen_from(at::kCPU, from));
  return to;
}
at::Scalar item(const Tensor& t) {
  tell("wait: item");
  at::AutoDispatchBelowADInplaceOrView below;
  return seen_from(at::kCPU, t).item();
}
// The demands of the kernel of compute capabilities 9 and 10, and what replaces it elsewhere: a product for each group.
Tensor grouped_mm(const Tensor& a, const Tensor& b, const std::optional<Tensor>& ends, const std::optional<Tensor>& bias, Dtype out) {
  TORCH_CHECK(a.device() == HERE && b.device() == HERE && ends && ends->device() == HERE, "grouped_mm: tensors on two devices");
  at::native::_grouped_mm_validate_inputs(a, b, ends, bias, out);
  const int64_t groups = ends->size(0);
  tell("aten::_grouped_mm");
  tell("groups: " + std::to_string(groups));
  if (grouped_kernel && a.scalar_type() == at::kBFloat16) {
    TORCH_CHECK(groups < 1024, "Can't process more than 1024 groups");
    TORCH_CHECK(b.dim() == 3 || (a.stride(0) == 1 && b.stride(1) == 1), "a group's length is no multiple of 16 bytes");
  } else {
    tell("wait: grouped_mm copies its offsets");
    for (int64_t group = 0; group < groups; ++group) tell("aten::mm");
  }
  at::AutoDispatchBelowADInplaceOrView below;
  auto cpu = [](const Tensor& t) { return seen_from(at::kCPU, t); };
  return seen_from(HERE, at::_grouped_mm(cpu(a), cpu(b), cpu(*ends), bias, out));
}

auto boxed() { return torch::CppFunction::makeFromBoxedFunction<&compute>(); }

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(boxed()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("_local_scalar_dense", TORCH_FN(item));
  m.impl("_grouped_mm", TORCH_FN(grouped_mm));
  m.impl("resize_", boxed());
}
TORCH_LIBRARY_IMPL(_, SparsePrivateUse1, m) { m.fallback(boxed()); }
TORCH_LIBRARY_IMPL(aten, SparsePrivateUse1, m) {  // those with a kernel for all devices, which would not know this one
  for (const char* name : {"_nnz", "sparse_dim", "dense_dim", "is_coalesced", "_coalesced_", "_coalesce", "_indices", "_values",
                           "indices", "values", "add.Tensor", "add_.Tensor", "add.out", "mul.Tensor", "mul_.Tensor", "mul.out",
                           "clone", "copy_", "zero_", "sparse_mask", "resize_as_sparse_", "empty.memory_format",
                           "_sparse_coo_tensor_with_dims_and_tensors", "_sparse_coo_tensor_with_dims"})
    m.impl(name, boxed());
}
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
namespace at::autocast {  // by CUDA's lists
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define IN_BFLOAT16(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define IN_FLOAT32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define TO_FLOAT32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define IN_THE_WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(IN_BFLOAT16)
  AT_FORALL_FP32(IN_FLOAT32)
  AT_FORALL_FP32_SET_OPT_DTYPE(TO_FLOAT32)
  AT_FORALL_PROMOTE(IN_THE_WIDEST)
}
}  // namespace at::autocast

PYBIND11_MODULE(mimic_native, m) {
  c10::SetAllocator(KIND, &memory);
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  m.def("listen", [](py::object heard) { listener = heard.is_none() ? nullptr : new py::object(std::move(heard)); });
  m.def("set_grouped_kernel", [](bool there) { grouped_kernel = there; });
}
