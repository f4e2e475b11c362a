// The operators that need more of the card than the host's kernel: memory, copies, and the ways to and from the host.
#include "card.h"

#include <ATen/ATen.h>
#include <ATen/native/TensorFactories.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>
#include <unordered_set>

namespace cnmix::card {

void register_collectives();
void register_device();
void register_operators(const std::unordered_set<std::string>& own);

namespace {

at::TensorOptions host_options(std::optional<c10::ScalarType> dtype) {
  return at::TensorOptions().device(c10::kCPU).dtype(dtype);
}

// Strict: what is read before it was written is NaN, or a type's greatest number, and shows.
at::Tensor marked(at::Tensor x) {
  return settings().strict ? at::native::fill_empty_deterministic_(x) : x;
}

at::Tensor empty(
    at::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout> layout,
    std::optional<c10::Device> device, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  TORCH_CHECK(!layout.has_value() || *layout == c10::kStrided, "the emulated card has no ", *layout, " tensors");
  const int card = card_of(device);
  return to_card(marked(at::empty(size, host_options(dtype), format)), card);
}

at::Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
    std::optional<c10::Device> device, std::optional<bool>) {
  const int card = card_of(device);
  return to_card(marked(at::empty_strided(size, stride, host_options(dtype))), card);
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  host_of(to).copy_(host_of(from), non_blocking);
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) {
    to.resize_(from.sizes());
  }
  return copy_from(from, to, false);
}

// Memory is never given back while a queue may use it: operations have finished when they return.
void record_stream(at::Tensor&, c10::Stream) {}

// Between the card's world and the host's, for kernels that read pointers: no copy, and differentiable.

at::Tensor host_kernel(const at::Tensor& x) {
  return host_of(x);
}

at::Tensor card_kernel(const at::Tensor& x, int64_t card) {
  check_card(card);
  return is_on_card(x) ? x : to_card(x, static_cast<int>(card));
}

// Marks a tensor without dimensions as what PyTorch makes of a Python number: it yields in type promotion. An operator
// cannot return one, since Python would get the number.
void mark_number(const at::Tensor& x) {
  x.unsafeGetTensorImpl()->set_wrapped_number(true);
}

struct ToCard : torch::autograd::Function<ToCard> {
  static at::Tensor forward(torch::autograd::AutogradContext*, const at::Tensor& x, int64_t card) {
    return card_kernel(x, card);
  }
  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext*, torch::autograd::variable_list gradients) {
    return {gradients[0].defined() ? host_of(gradients[0]) : gradients[0], at::Tensor()};
  }
};

struct ToHost : torch::autograd::Function<ToHost> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x) {
    context->saved_data["card"] = static_cast<int64_t>(x.device().index());
    return host_of(x);
  }
  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, torch::autograd::variable_list gradients) {
    const auto& gradient = gradients[0];
    return {gradient.defined() ? card_kernel(gradient, context->saved_data["card"].toInt()) : gradient};
  }
};

at::Tensor differentiable_host(const at::Tensor& x) {
  return at::GradMode::is_enabled() && x.requires_grad() ? ToHost::apply(x) : host_of(x);
}

at::Tensor differentiable_card(const at::Tensor& x, int64_t card) {
  return at::GradMode::is_enabled() && x.requires_grad() ? ToCard::apply(x, card) : card_kernel(x, card);
}

TORCH_LIBRARY(cnmix_card, library) {
  library.def("host(Tensor x) -> Tensor");
  library.def("card(Tensor x, int card) -> Tensor");
  library.def("mark_number_(Tensor(a!) x) -> ()");
  library.impl("host", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(host_kernel));
  library.impl("card", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(card_kernel));
  library.impl("mark_number_", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(mark_number));
  library.impl("host", c10::DispatchKey::AutogradPrivateUse1, TORCH_FN(differentiable_host));
  library.impl("card", c10::DispatchKey::AutogradCPU, TORCH_FN(differentiable_card));
}

const std::unordered_set<std::string>& own_operators() {
  static const std::unordered_set<std::string> names{
      "empty.memory_format", "empty_strided", "_copy_from", "_copy_from_and_resize"};
  return names;
}

}  // namespace

}  // namespace cnmix::card

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  using namespace cnmix::card;
  library.impl("empty.memory_format", TORCH_FN(empty));
  library.impl("empty_strided", TORCH_FN(empty_strided));
  library.impl("_copy_from", TORCH_FN(copy_from));
  library.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  library.impl("record_stream", TORCH_FN(record_stream));
}

// What Python calls, by ctypes: an exception must not leave, and is a negative result instead.
namespace {

using Speak = void (*)(const char*);

Speak speak = nullptr;
thread_local std::string failure;

template <typename Body>
int guarded(Body body) {
  try {
    return body();
  } catch (const c10::Error& error) {
    failure = error.what_without_backtrace();
  } catch (const std::exception& error) {
    failure = error.what();
  }
  return -1;
}

}  // namespace

void cnmix::card::say(const char* text) {
  if (speak != nullptr) {
    speak(text);
  }
}

#define FOR_PYTHON __attribute__((visibility("default")))

extern "C" {

FOR_PYTHON const char* cnmix_card_failure() {
  return failure.c_str();
}

FOR_PYTHON int cnmix_card_register(Speak say) {
  return guarded([say] {
    speak = say;
    cnmix::card::register_device();
    cnmix::card::register_operators(cnmix::card::own_operators());
    cnmix::card::register_collectives();
    return 0;
  });
}

FOR_PYTHON void cnmix_card_set(int cards, bool strict, bool fixed_point, int64_t memory) {
  auto& settings = cnmix::card::settings();
  settings.cards = cards;
  settings.strict = strict;
  settings.fixed_point = fixed_point;
  settings.memory = memory;
}

FOR_PYTHON int cnmix_card_current() {
  return cnmix::card::current_card();
}

FOR_PYTHON int cnmix_card_exchange(int card) {
  return guarded([card] { return cnmix::card::set_current_card(card); });
}

FOR_PYTHON void cnmix_card_memory(int card, int64_t* counts) {
  auto& memory = cnmix::card::memory(card);
  counts[0] = memory.allocated;
  counts[1] = memory.peak;
  counts[2] = memory.allocations;
}

FOR_PYTHON void cnmix_card_reset_peak(int card) {
  auto& memory = cnmix::card::memory(card);
  memory.peak = memory.allocated.load();
}
}
