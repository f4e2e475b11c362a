// Collectives: those of the host's backend, on host views. What they write is the card's memory.
#include "card.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
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

// A card's backend counts elements here, where the host's wants a first dimension that the processes divide.
bool is_flat(const std::string& name) {
  return name == "c10d::_allgather_base_" || name == "c10d::_reduce_scatter_base_";
}

void collective(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t begin = stack->size() - op.schema().arguments().size();
  const bool flat = is_flat(op.schema().name());
  for (size_t i = begin; i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    value = to_host(value);
    if (flat && value.isTensor() && value.toTensor().is_contiguous()) {
      value = value.toTensor().view(-1);
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

namespace c10d {

namespace {

// DDP times its steps with one of these, and says in every process that a device has none.
class CardTimer final : public Timer {
 public:
  explicit CardTimer(c10::Device) {}

  std::optional<int64_t> measureDifference(Event start, Event end) override {
    const auto begin = getTimeRef(start), finish = getTimeRef(end);
    return begin == kUnsetTime || finish == kUnsetTime || finish < begin ? std::nullopt
                                                                         : std::optional<int64_t>(finish - begin);
  }
};

}  // namespace

C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::DeviceType::PrivateUse1, CardTimer)

}  // namespace c10d
