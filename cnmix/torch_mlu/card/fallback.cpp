// The kernel behind almost every operator of the card: the host's kernel, on host views of the card's tensors.
#include "card.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <algorithm>
#include <mutex>
#include <unordered_set>

namespace cnmix::card {

at::Generator host_generator(const at::Generator& generator);

namespace {

using c10::IValue;

// A card's tensor among the arguments, and its host view.
struct Pair {
  at::Tensor card, host;
  bool written;
};

// What is learnt of a call's arguments while they are replaced.
struct Call {
  const c10::OperatorHandle& op;
  int card = -1;  // of the first of the card's tensors
  bool to_host = false;  // the caller asks for a result on the host
  const c10::Argument* host_argument = nullptr;  // a host tensor that the card would refuse
  c10::SmallVector<Pair, 4> pairs;
  c10::SmallVector<c10::Storage, 1> storages;  // of the card, among the arguments
};

// Arguments that the card itself wants, or takes, on the host: lengths, indices, what is copied.
bool takes_from_host(const std::string& op, const std::string& argument) {
  static const std::unordered_set<std::string> arguments{
      "lengths", "batch_sizes", "input_lengths", "target_lengths", "indices", "tensor_indices_or_sections"};
  static const std::unordered_set<std::string> operators{
      "aten::copy_", "aten::_copy_from", "aten::_copy_from_and_resize", "aten::set_"};
  return arguments.count(argument) > 0 || operators.count(op) > 0;
}

at::Tensor on_host(Call& call, const at::Tensor& x, const c10::Argument& argument, bool written) {
  if (!x.defined()) {
    return x;
  }
  if (x.device().type() != kCard) {
    // A number becomes the card's by itself.
    if (x.dim() > 0 && x.device().type() == c10::kCPU && call.host_argument == nullptr &&
        !takes_from_host(call.op.schema().name(), argument.name())) {
      call.host_argument = &argument;
    }
    return x;
  }
  const int card = x.device().index();
  if (call.card < 0) {
    call.card = card;
  } else if (call.card != card && x.dim() > 0) {
    TORCH_CHECK(
        false, call.op.schema().name(), " got tensors of mlu:", call.card, " and of mlu:", card,
        ": bring them to one card with .to()");
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
      value = IValue(c10::Device(c10::kCPU));
    } else {
      call.to_host = true;
    }
  } else if (value.isStorage()) {
    if (value.toStorage().device().type() == kCard) {
      call.storages.push_back(value.toStorage());
      value = IValue(c10::Storage(host_storage(call.storages.back())));
    }
  } else if (value.isGenerator()) {
    value = IValue(host_generator(value.toGenerator()));
  }
}

// The card's storage on one of the host: an argument's where it has it.
c10::Storage storage_on_card(const Call& call, const c10::Storage& host, int card) {
  const auto* impl = host.unsafeGetStorageImpl();
  for (const auto& each : call.storages) {
    if (host_storage(each).unsafeGetStorageImpl() == impl) {
      return each;
    }
  }
  for (const auto& pair : call.pairs) {
    const auto& storage = pair.card.storage();
    if (host_storage(storage).unsafeGetStorageImpl() == impl) {
      return storage;
    }
  }
  return card_storage(host, card);
}

// Gives a card's tensor what the host's kernel did to its host view: another size, another storage, more memory.
void follow(const Call& call, const Pair& pair, int card) {
  auto* impl = pair.card.unsafeGetTensorImpl();
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

// A result's tensor of the card: on the storage of the argument that it is a view of, or of a result before it.
at::Tensor from_host(Call& call, const at::Tensor& x, int card) {
  if (!x.defined() || x.device().type() != c10::kCPU || x.layout() != c10::kStrided) {
    return x;
  }
  auto result = card_view(x, storage_on_card(call, x.storage(), card));
  call.pairs.push_back({result, x, false});
  return result;
}

// The argument that a result is, by the operator's own declaration.
int written_argument(const c10::FunctionSchema& schema, const c10::Argument& result) {
  const auto& arguments = schema.arguments();
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i].alias_info() != nullptr && *arguments[i].alias_info() == *result.alias_info()) {
      return static_cast<int>(i);
    }
  }
  return -1;
}

void refuse_or_warn(const Call& call) {
  const auto text = "aten operator " + call.op.schema().name() + " got its argument " + call.host_argument->name() +
      " from the host and others from mlu:" + std::to_string(call.card) + ", which a card refuses: bring it there with .to('mlu')";
  TORCH_CHECK(!settings().strict, text);
  warn_once(text);
}

}  // namespace

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& arguments = schema.arguments();
  const auto& results = schema.returns();
  const size_t begin = stack->size() - arguments.size();

  Call call{op};
  bool writes = false;
  for (const auto& result : results) {
    writes = writes || (result.alias_info() != nullptr && result.alias_info()->isWrite());
  }
  c10::SmallVector<IValue, 8> given;
  if (writes) {
    given.append(stack->begin() + static_cast<std::ptrdiff_t>(begin), stack->end());
  }
  for (size_t i = 0; i < arguments.size(); ++i) {
    to_host(call, (*stack)[begin + i], arguments[i]);
  }
  if (call.host_argument != nullptr && call.card >= 0) {
    refuse_or_warn(call);
  }
  const int card = call.card < 0 ? current_card() : call.card;
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);

  for (const auto& pair : call.pairs) {
    if (pair.written) {
      follow(call, pair, card);
    }
  }
  const size_t first = stack->size() - results.size();
  for (size_t i = 0; i < results.size(); ++i) {
    auto& value = (*stack)[first + i];
    if (writes && results[i].alias_info() != nullptr && results[i].alias_info()->isWrite()) {
      const int index = written_argument(schema, results[i]);
      if (index >= 0) {
        value = given[static_cast<size_t>(index)];
        continue;
      }
    }
    if (call.to_host) {
      continue;
    }
    if (value.isTensor()) {
      value = IValue(from_host(call, value.toTensor(), card));
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
        !op->hasKernelForDispatchKey(c10::DispatchKey::CPU) ||
        op->hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1)) {
      continue;
    }
    aten.impl(full.substr(6).c_str(), torch::CppFunction::makeFromBoxedFunction<&fallback>());
  }
}

}  // namespace cnmix::card
