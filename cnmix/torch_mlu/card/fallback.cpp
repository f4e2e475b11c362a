// The kernel behind almost every operator of the card: the host's kernel, on host views of the card's tensors.
#include "card.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <algorithm>
#include <mutex>
#include <unordered_set>

namespace cnmix::card {

at::Generator host_generator(const at::Generator& generator);

bool is_refused(const std::string& op, const std::string& argument, const at::Tensor& x, bool written);

namespace {

using c10::IValue;

// A tensor among the arguments, and what the host's kernel gets for it: the host view of a card's, or itself.
struct Pair {
  at::Tensor given, host;
  bool written;
};

// What is learnt of a call's arguments while they are replaced.
struct Call {
  const c10::OperatorHandle& op;
  int card = -1;  // of the first of the card's tensors
  bool to_host = false;  // the caller asks for a result on the host
  const c10::Argument* host_argument = nullptr;  // a host tensor that the card would refuse
  const c10::Argument* host_generator = nullptr;
  bool card_generator = false;
  c10::SmallVector<Pair, 4> pairs;
  c10::SmallVector<c10::Storage, 1> storages;  // of the card, among the arguments
};

at::Tensor on_host(Call& call, const at::Tensor& x, const c10::Argument& argument, bool written) {
  if (!x.defined()) {
    return x;
  }
  if (x.device().type() != kCard) {
    if (call.host_argument == nullptr && is_refused(call.op.schema().name(), argument.name(), x, written)) {
      call.host_argument = &argument;
    }
    call.pairs.push_back({x, x, false});
    return x;
  }
  const int card = x.device().index();
  if (call.card < 0) {
    call.card = card;
  }
  TORCH_CHECK(
      call.card == card, call.op.schema().name(), " got its argument ", argument.name(), " from mlu:", card,
      " and others from mlu:", call.card, ": bring them to one card with .to()");
  // The same tensor twice stays one: kernels ask whether the output is an input. Long lists have none of these.
  const size_t known = std::min<size_t>(call.pairs.size(), 8);
  for (size_t i = 0; i < known; ++i) {
    if (call.pairs[i].given.is_same(x)) {
      call.pairs[i].written = call.pairs[i].written || written;
      return call.pairs[i].host;
    }
  }
  auto view = host_view(x);
  call.pairs.push_back({x, view, written});
  return view;
}

void to_host(Call& call, IValue& value, const c10::Argument& argument) {
  const bool written = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
  if (value.isTensor()) {
    const auto& x = value.toTensor();
    if (x.defined()) {
      value = IValue(on_host(call, x, argument, written));
    }
  } else if (value.isTensorList()) {
    auto list = value.toTensorVector();
    for (auto& each : list) {
      each = on_host(call, each, argument, written);
    }
    value = IValue(std::move(list));
  } else if (value.isList() && value.toList().elementType()->isSubtypeOf(c10::OptionalType::ofTensor())) {
    auto list = value.toList().copy();
    for (size_t i = 0; i < list.size(); ++i) {
      const IValue each = list.get(i);
      if (each.isTensor()) {
        list.set(i, IValue(on_host(call, each.toTensor(), argument, written)));
      }
    }
    value = IValue(std::move(list));
  } else if (value.isDevice()) {
    if (value.toDevice().type() == kCard) {
      call.card = call.card < 0 ? value.toDevice().index() : call.card;
      check_card(call.card);
      value = IValue(c10::Device(c10::kCPU));
    } else {
      call.to_host = true;
    }
  } else if (value.isStorage()) {
    TORCH_CHECK(
        value.toStorage().device().type() == kCard || call.card < 0, call.op.schema().name(),
        " cannot share memory between the host and mlu:", call.card, ": copy with .to() or copy_()");
    if (value.toStorage().device().type() == kCard) {
      call.storages.push_back(value.toStorage());
      value = IValue(c10::Storage(host_storage(call.storages.back())));
    }
  } else if (value.isGenerator()) {
    const auto& generator = value.toGenerator();
    if (generator.device().type() == c10::kCPU) {
      call.host_generator = &argument;
    } else {
      call.card_generator = true;
    }
    value = IValue(host_generator(generator));
  }
}

// The card's storage on one of the host: an argument's, or an earlier result's, where it has it.
c10::Storage storage_on_card(const Call& call, const c10::Storage& host, int card) {
  const auto* impl = host.unsafeGetStorageImpl();
  for (const auto& each : call.storages) {
    if (host_storage(each).unsafeGetStorageImpl() == impl) {
      return each;
    }
  }
  for (const auto& pair : call.pairs) {
    if (is_on_card(pair.given) && host_storage(pair.given.storage()).unsafeGetStorageImpl() == impl) {
      return pair.given.storage();
    }
  }
  return card_storage(host, card);
}

// Gives a card's tensor what the host's kernel did to its host view: another size, another storage, more memory.
void follow(const Call& call, const Pair& pair, int card) {
  auto* impl = pair.given.unsafeGetTensorImpl();
  const auto* view = pair.host.unsafeGetTensorImpl();
  const auto& storage = view->storage();
  if (storage.unsafeGetStorageImpl() != host_storage(impl->storage()).unsafeGetStorageImpl()) {
    impl->set_storage_keep_dtype(storage_on_card(call, storage, card));
  } else {
    follow_resize(impl->storage());
  }
  if (impl->sizes() != view->sizes() || impl->strides() != view->strides() ||
      impl->storage_offset() != view->storage_offset()) {
    impl->set_sizes_and_strides(view->sizes(), view->strides(), view->storage_offset());
  }
}

// A result's tensor of the card: the argument that it is, or one on the storage of the argument that it is a view of.
at::Tensor from_host(Call& call, const at::Tensor& x, int card) {
  if (!x.defined() || x.device().type() != c10::kCPU) {
    return x;
  }
  for (const auto& pair : call.pairs) {
    if (pair.host.is_same(x)) {
      return pair.given;
    }
  }
  check_result(call.op.schema().name(), x);
  if (x.storage().use_count() == 1) {
    return card_view(x, card_storage(x.storage(), card));
  }
  auto result = card_view(x, storage_on_card(call, x.storage(), card));
  call.pairs.push_back({result, x, false});
  return result;
}

// Results that are the host's on every device.
bool stays_on_host(const c10::OperatorHandle& op, size_t result) {
  return result == 1 && op.schema().name() == "aten::_pack_padded_sequence";
}

void refuse_or_warn(const Call& call) {
  const int index = call.card < 0 ? current_card() : call.card;
  const auto card = "mlu:" + std::to_string(index);
  if (call.host_argument != nullptr) {
    TORCH_CHECK(
        call.op.schema().name() != "aten::set_", "aten::set_ cannot share memory between the host and ", card,
        ": copy with .to() or copy_()");
    refuse(from_host_text(call.op.schema().name(), call.host_argument->name(), index));
  }
  if (call.host_generator != nullptr) {
    refuse(
        call.op.schema().name() + " on " + card + " got a generator of the host: a card refuses that; make it with " +
        "torch.Generator('" + card + "')");
  }
}

}  // namespace

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& arguments = schema.arguments();
  const auto& results = schema.returns();
  const size_t begin = stack->size() - arguments.size();

  Call call{op};
  for (size_t i = 0; i < arguments.size(); ++i) {
    to_host(call, (*stack)[begin + i], arguments[i]);
  }
  if ((call.host_argument != nullptr && call.card >= 0) || call.host_generator != nullptr) {
    refuse_or_warn(call);
  }
  TORCH_CHECK(
      !call.card_generator || call.card >= 0, "Expected a 'cpu' device type for generator but found 'mlu' (",
      schema.name(), ")");
  const int card = call.card < 0 ? current_card() : call.card;
  try {
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  } catch (const c10::NotImplementedError&) {
    // Else PyTorch's list of all backends, and that the CPU has no kernel, where a script names the card.
    TORCH_CHECK_NOT_IMPLEMENTED(
        op.hasComputedKernelForDispatchKey(c10::DispatchKey::CPU), schema.name(),
        ": the emulated card runs the host's kernels, and the host has none for this operator");
    throw;
  }

  for (const auto& pair : call.pairs) {
    if (pair.written) {
      follow(call, pair, card);
    }
  }
  if (call.to_host) {
    return;
  }
  const size_t first = stack->size() - results.size();
  for (size_t i = 0; i < results.size(); ++i) {
    auto& value = (*stack)[first + i];
    if (value.isTensor()) {
      if (!stays_on_host(op, i)) {
        value = IValue(from_host(call, value.toTensor(), card));
      }
    } else if (value.isTensorList()) {
      auto list = value.toTensorVector();
      for (auto& each : list) {
        each = from_host(call, each, card);
      }
      value = IValue(std::move(list));
    }
  }
}

namespace {

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  run_on_host(op, stack);
}

// Composite operators that ask for the host by name, or whether two references are one tensor.
const std::unordered_set<std::string>& composite_on_host() {
  static const std::unordered_set<std::string> names{"mode.values", "addr_", "conj_physical_"};
  return names;
}

// Whether ``tensor.data = other`` can be: as between a host and a device that PyTorch knows, so that a module keeps its
// parameters when it moves.
bool is_of_one_kind(const at::Tensor& x, const at::Tensor& y) {
  const auto is_dense = [](const at::Tensor& each) {
    return !each.is_nested() && each.layout() == c10::kStrided && !each.is_quantized() && !each.is_meta();
  };
  return is_dense(x) && is_dense(y);
}

// The host's has no memory, and a mark for it that the fallback would lose.
at::Tensor efficient_zeros(
    at::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
    std::optional<c10::Device> device, std::optional<bool>) {
  return to_card(at::zeros(size, at::TensorOptions().device(c10::kCPU).dtype(dtype)), card_of(device));
}

}  // namespace

// Operators with a kernel of the host's get this one by name: PyTorch would else take a composite one, which allocates
// the result and calls the operator's out form, and both cost.
void register_operators(const std::unordered_set<std::string>& own) {
  static torch::Library aten(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  static torch::Library any(torch::Library::IMPL, "_", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  any.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findOp(name);
    const auto full = name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
    if (!op.has_value() || name.name.rfind("aten::", 0) != 0 || own.count(full.substr(6)) > 0 || !op->hasSchema() ||
        !(op->hasKernelForDispatchKey(c10::DispatchKey::CPU) || composite_on_host().count(full.substr(6)) > 0) ||
        op->hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1)) {
      continue;
    }
    aten.impl(full.substr(6).c_str(), torch::CppFunction::makeFromBoxedFunction<&fallback>());
  }
}

}  // namespace cnmix::card

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  // Views read no memory: PyTorch's kernels make them on any device.
  library.impl("_has_compatible_shallow_copy_type", TORCH_FN(cnmix::card::is_of_one_kind));
  library.impl("_efficientzerotensor", TORCH_FN(cnmix::card::efficient_zeros));
  library.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  library.impl("view", TORCH_FN(at::native::view));
  library.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  library.impl("unfold", TORCH_FN(at::native::unfold));
  library.impl("view_as_real", TORCH_FN(at::native::view_as_real));
  library.impl("view_as_complex", TORCH_FN(at::native::view_as_complex));
}

// Copies understand conjugate and negative views; PyTorch's own fallback would copy to resolve them, for ever.
TORCH_LIBRARY_IMPL(aten, Conjugate, library) {
  library.impl("_copy_from", torch::CppFunction::makeFallthrough());
  library.impl("_copy_from_and_resize", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, Negative, library) {
  library.impl("_copy_from", torch::CppFunction::makeFallthrough());
  library.impl("_copy_from_and_resize", torch::CppFunction::makeFallthrough());
}
