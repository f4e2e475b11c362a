// Collectives: those of the host's backend, on host views. What they write is the card's memory.
#include "card.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

namespace cnmix::card {

namespace {

using c10::IValue;

// Replaces the card's tensors in what a collective takes, lists of lists included.
IValue to_host(const IValue& value) {
  if (value.isTensor()) {
    return is_on_card(value.toTensor()) ? IValue(host_view(value.toTensor())) : value;
  }
  if (value.isList()) {
    auto list = value.toList().copy();
    for (size_t i = 0; i < list.size(); ++i) {
      list.set(i, to_host(list.get(i)));
    }
    return IValue(std::move(list));
  }
  return value;
}

void collective(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t begin = stack->size() - op.schema().arguments().size();
  for (size_t i = begin; i < stack->size(); ++i) {
    (*stack)[i] = to_host((*stack)[i]);
  }
  if (op.schema().name() == "c10d::_allgather_base_") {
    // A card's backend gathers bytes, whatever the shapes; gloo wants the first dimension to be that of the processes.
    for (size_t i = begin; i < begin + 2; ++i) {
      (*stack)[i] = IValue((*stack)[i].toTensor().view({-1}));
    }
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
}

// PyTorch registers kernels for a private-use device, which ask its process group for a backend of its own.
struct Silent final : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

}  // namespace

void register_collectives() {
  static Silent silent;
  const c10::WarningUtils::WarningHandlerGuard guard(&silent);
  static torch::Library library(torch::Library::IMPL, "c10d", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findOp(name);
    if (name.name.rfind("c10d::", 0) == 0 && op.has_value() && op->hasSchema() &&
        op->hasKernelForDispatchKey(c10::DispatchKey::CPU)) {
      const auto full = name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
      library.impl(full.substr(6).c_str(), torch::CppFunction::makeFromBoxedFunction<&collective>());
    }
  }
}

}  // namespace cnmix::card
