// A device that claims to be an accelerator and computes on the CPU, in torch's slot for foreign devices (PrivateUse1).
//
// Every operation without a kernel of its own arrives at `compute`, which refuses tensors on two devices as CUDA does, tells
// Python its name, and how many kernels CUDA launches for it, and runs the CPU's kernel on the same memory. What Python is told
// beside that: what makes the host wait.
#include <ATen/ATen.h>
#include <ATen/SDPBackend.h>
#include <ATen/SparseTensorImpl.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/GroupedMMUtils.h>
#include <ATen/native/transformers/attention.h>
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
bool apart = false;              // what is one operation on CUDA is many: attention by its parts, lists tensor by tensor

void tell(const std::string& what, int64_t kernels = 1) {
  if (!listener) return;
  py::gil_scoped_acquire gil;
  (*listener)(what, kernels);
}

// -- how many kernels CUDA launches --------------------------------------------------------------------------------------
// For lists of tensors, `depth` at a time, as PyTorch's ATen/native/cuda/MultiTensorApply.cuh counts: a launch ends with its
// last tensor or its last block, of which each takes a chunk. The limits are those of builds for CUDA 12; CUDA 13 has seven
// times as high ones.
int64_t launches(const std::vector<Tensor>& list, size_t depth) {
  constexpr int64_t MOST_TENSORS[] = {110, 64, 48, 36, 30}, MOST_BLOCKS = 320, CHUNK = 65536;
  int64_t launched = 0, tensors = 0, blocks = 0;
  for (const Tensor& t : list) {
    int64_t chunks = (t.numel() + CHUNK - 1) / CHUNK;
    tensors += chunks > 0;
    for (; chunks > 0; --chunks)
      if (++blocks == MOST_BLOCKS || (chunks == 1 && tensors == MOST_TENSORS[depth - 1])) {
        ++launched;
        blocks = 0;
        tensors = chunks > 1;
      }
  }
  return launched + (blocks > 0);
}

bool is_alike(const Tensor& t, const Tensor& first) {
  return t.sizes() == first.sizes() && t.strides() == first.strides() && t.is_non_overlapping_and_dense();
}

int64_t kernels(const c10::FunctionSchema& schema, const torch::jit::Stack& stack) {
  static const std::set<std::string> NONE = {"aten::resize_", "aten::_values", "aten::_indices", "aten::values", "aten::indices",
                                             "aten::is_coalesced", "aten::_coalesced_", "aten::_nnz", "aten::sparse_dim",
                                             "aten::dense_dim", "aten::_sparse_coo_tensor_with_dims_and_tensors"};
  const std::string& name = schema.name();
  if (NONE.count(name)) return 0;
  if (name == "aten::native_layer_norm_backward") return 2;  // layer_norm_kernel.cu: the input's gradient, the parameters'
  if (name.find("aten::_foreach_") != 0 && name.find("aten::_fused_adam") != 0) return 1;
  const auto& arguments = schema.arguments();
  std::vector<std::vector<Tensor>> lists;
  for (size_t place = 0; place < arguments.size(); ++place) {
    const IValue& value = stack[stack.size() - arguments.size() + place];
    if (value.isTensorList() && value.toListRef().size() && arguments[place].name() != "state_steps")
      lists.push_back(value.toTensorVector());
  }
  for (const auto& list : lists)
    for (size_t place = 0; place < list.size(); ++place)
      if (!is_alike(list[place], lists[0][place]) || list[place].dtype() != list[0].dtype()) return list.size();
  if (name == "aten::_foreach_norm")  // ForeachReduceOp.cu: two tensors are cleared; 400 norms at a time get their last sum
    return launches(lists[0], 1) + 2 + (lists[0].size() + 399) / 400;
  return launches(lists[0], lists.size() + schema.returns().size());
}

int64_t parts(const c10::FunctionSchema& schema, const IValue& argument) {  // torch's own, of operations that CUDA has as one
  if (schema.name() == "aten::native_layer_norm") return 2;
  return schema.name().find("aten::_foreach_") == 0 ? argument.toListRef().size() : 1;
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
  const std::string label = schema.overload_name().empty() ? name : name + "." + schema.overload_name();
  tell(label, apart ? parts(schema, (*stack)[first]) : kernels(schema, *stack));
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

// Attention, of whose parts CUDA makes one kernel forward and three backward (flash_bwd_launch_template.h: dot_do_o, dq_dk_dv,
// convert_dq); results lie document by document, as theirs do. What dropout keeps rides where CUDA keeps its seed.
using Number = std::optional<double>;

int64_t attention_kind(const Tensor& q, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, Number,
                       bool gqa) {
  return static_cast<int64_t>(apart || q.dim() != 4 || gqa ? at::SDPBackend::math : at::SDPBackend::overrideable);
}
Tensor in_float32(const Tensor& t) { return t.defined() ? seen_from(at::kCPU, t).to(at::kFloat) : t; }
Tensor by_document(const Tensor& t, const Tensor& like) {
  return seen_from(HERE, t.to(like.scalar_type()).transpose(1, 2).contiguous().transpose(1, 2));
}
Tensor attention_weights(const Tensor& q, const Tensor& k, const Tensor& bias, bool causal, double scale) {
  Tensor logits = q.matmul(k.mT()).mul_(scale);
  if (bias.defined()) logits.add_(bias);
  if (causal) logits.masked_fill_(at::ones({q.size(2), k.size(2)}, at::kBool).triu(1), -INFINITY);
  return logits.softmax(-1);
}
double scale_of(const Tensor& q, Number scale) { return scale ? *scale : 1 / std::sqrt(static_cast<double>(q.size(3))); }

std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor> attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias, double dropout, bool causal, bool,
    Number scale) {
  tell("aten::_flash_attention_forward");
  at::AutoDispatchBelowADInplaceOrView below;
  Tensor wide_bias = in_float32(bias.value_or(Tensor()));
  Tensor weight = attention_weights(in_float32(q), in_float32(k), wide_bias, causal, scale_of(q, scale));
  Tensor kept = at::ones_like(weight);
  if (dropout > 0) kept.bernoulli_(1 - dropout).div_(1 - dropout);
  auto none = [] { return empty({0}, at::kFloat, {}, {}, {}, {}); };
  Tensor out = by_document((weight * kept).matmul(in_float32(v)), q);
  return {out, none(), none(), none(), q.size(2), k.size(2), seen_from(HERE, kept), none(), none()};
}
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& gradient, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias, std::array<bool, 4> wanted,
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, c10::SymInt, c10::SymInt, double, bool causal,
    const Tensor& kept, const Tensor&, Number scale) {
  tell("aten::_flash_attention_backward", 3);
  at::AutoDispatchBelowADInplaceOrView below;
  const double by = scale_of(q, scale);
  Tensor out = in_float32(gradient), keep = in_float32(kept);
  Tensor weight = attention_weights(in_float32(q), in_float32(k), in_float32(bias), causal, by);
  Tensor of_v = (weight * keep).mT().matmul(out);
  Tensor of_weight = out.matmul(in_float32(v).mT()) * keep;
  Tensor of_logits = weight * (of_weight - (of_weight * weight).sum(-1, true));
  Tensor of_q = of_logits.matmul(in_float32(k)) * by, of_k = of_logits.mT().matmul(in_float32(q)) * by, of_bias;
  if (wanted[3] && bias.defined()) of_bias = seen_from(HERE, of_logits.sum_to_size(bias.sizes()).to(bias.scalar_type()));
  return {by_document(of_q, q), by_document(of_k, k), by_document(of_v, v), of_bias};
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
  m.impl("_scaled_dot_product_fused_attention_overrideable", TORCH_FN(attention));
  m.impl("_scaled_dot_product_fused_attention_overrideable_backward", TORCH_FN(attention_backward));
  // those with kernels of their own on CUDA, that would be taken apart here
  for (const char* name : {"resize_", "native_layer_norm", "_foreach_norm.Scalar", "_foreach_mul_.Scalar",
                           "_foreach_add_.Scalar", "_foreach_copy_"})
    m.impl(name, boxed());
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
namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &attention_kind)
}  // namespace at::native

PYBIND11_MODULE(mimic_native, m) {
  c10::SetAllocator(KIND, &memory);
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  m.def("listen", [](py::object heard) { listener = heard.is_none() ? nullptr : new py::object(std::move(heard)); });
  m.def("set_grouped_kernel", [](bool there) { grouped_kernel = there; });
  m.def("take_apart", [](bool all) { apart = all; });
}
