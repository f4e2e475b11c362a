// The operators that need more of the card than the host's kernel: memory, copies, products.
#include "card.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/TensorFactories.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <mutex>
#include <unordered_set>

namespace cnmix::card {

void register_device();
void register_operators(const std::unordered_set<std::string>& own);

namespace {

int card_of(std::optional<c10::Device> device) {
  return device.has_value() && device->index() >= 0 ? device->index() : current_card();
}

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
  check_card(card);
  return to_card(marked(at::empty(size, host_options(dtype), format)), card);
}

at::Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
    std::optional<c10::Device> device, std::optional<bool>) {
  const int card = card_of(device);
  check_card(card);
  return to_card(marked(at::empty_strided(size, stride, host_options(dtype))), card);
}

at::Tensor host_of(const at::Tensor& x) {
  return is_on_card(x) ? host_view(x) : x;
}

std::optional<at::Tensor> host_of(const std::optional<at::Tensor>& x) {
  return x.has_value() && x->defined() ? std::optional<at::Tensor>(host_of(*x)) : std::nullopt;
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

// The products. On the 200 series those of float tensors run as int31; Python has the kernels.

bool in_fixed_point(const at::Tensor& a) {
  return settings().fixed_point && at::isFloatingType(a.scalar_type());
}

at::Tensor fixed_matmul(const at::Tensor& a, const at::Tensor& b) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("cnmix::fixed_matmul", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&)>();
  return op.call(a, b);
}

int card_index(const at::Tensor& a, const at::Tensor& b) {
  return is_on_card(a) ? a.device().index() : b.device().index();
}

void check_host(const char* op, const at::Tensor& a, const at::Tensor& b) {
  if (is_on_card(a) == is_on_card(b)) {
    TORCH_CHECK(
        !is_on_card(a) || a.device() == b.device(), "aten::", op, " got tensors of ", a.device(), " and of ", b.device(),
        ": bring them to one card with .to()");
    return;
  }
  const auto text = std::string("aten::") + op + " got one operand from the host and one from mlu:" +
      std::to_string(card_index(a, b)) + ", which a card refuses: bring it there with .to('mlu')";
  TORCH_CHECK(!settings().strict, text);
  warn_once(text);
}

at::Tensor product(const char* op, const at::Tensor& a, const at::Tensor& b) {
  check_host(op, a, b);
  const auto x = host_of(a), y = host_of(b);
  return in_fixed_point(a) ? fixed_matmul(x, y) : at::matmul(x, y);
}

at::Tensor mm(const at::Tensor& a, const at::Tensor& b) {
  TORCH_CHECK(a.dim() == 2 && b.dim() == 2, "mm takes two matrices, got ", a.sizes(), " and ", b.sizes());
  check_host("mm", a, b);
  const auto x = host_of(a), y = host_of(b);
  return to_card(in_fixed_point(a) ? fixed_matmul(x, y) : at::mm(x, y), card_index(a, b));
}

at::Tensor bmm(const at::Tensor& a, const at::Tensor& b) {
  TORCH_CHECK(a.dim() == 3 && b.dim() == 3, "bmm takes two batches, got ", a.sizes(), " and ", b.sizes());
  check_host("bmm", a, b);
  const auto x = host_of(a), y = host_of(b);
  return to_card(in_fixed_point(a) ? fixed_matmul(x, y) : at::bmm(x, y), card_index(a, b));
}

at::Tensor mv(const at::Tensor& a, const at::Tensor& b) {
  return to_card(product("mv", a, b), card_index(a, b));
}

at::Tensor dot(const at::Tensor& a, const at::Tensor& b) {
  TORCH_CHECK(a.dim() == 1 && b.dim() == 1, "dot takes two vectors, got ", a.sizes(), " and ", b.sizes());
  return to_card(product("dot", a, b), card_index(a, b));
}

// beta * bias + alpha * (a @ b)
template <at::Tensor (*on_host)(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Scalar&, const at::Scalar&)>
at::Tensor add_product(
    const at::Tensor& bias, const at::Tensor& a, const at::Tensor& b, const at::Scalar& beta, const at::Scalar& alpha) {
  check_host("addmm", a, b);
  if (bias.dim() > 0) {
    check_host("addmm", bias, a);
  }
  const int card = card_index(a, b);
  const auto z = host_of(bias), x = host_of(a), y = host_of(b);
  if (!in_fixed_point(a)) {
    return to_card(on_host(z, x, y, beta, alpha), card);
  }
  auto sum = fixed_matmul(x, y);
  if (!alpha.equal(1)) {
    sum.mul_(alpha);
  }
  if (!beta.equal(0)) {
    sum.add_(z, beta);
  }
  return to_card(sum, card);
}

using Sizes = c10::SymIntArrayRef;

at::Tensor convolution(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, Sizes stride, Sizes padding,
    Sizes dilation, bool transposed, Sizes output_padding, c10::SymInt groups) {
  check_host("convolution", x, weight);
  const auto z = host_of(bias);
  if (in_fixed_point(x)) {
    static const auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("cnmix::fixed_convolution", "")
            .typed<at::Tensor(
                const at::Tensor&, const at::Tensor&, Sizes, Sizes, Sizes, bool, Sizes, c10::SymInt)>();
    auto y = op.call(host_of(x), host_of(weight), stride, padding, dilation, transposed, output_padding, groups);
    if (z.has_value()) {
      auto shape = std::vector<int64_t>(static_cast<size_t>(y.dim()), 1);
      shape[1] = -1;
      y.add_(z->view(shape));
    }
    return to_card(y, card_index(x, weight));
  }
  return to_card(
      at::convolution_symint(
          host_of(x), host_of(weight), z, stride, padding, dilation, transposed, output_padding, groups),
      card_index(x, weight));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, Sizes stride, Sizes padding, Sizes dilation,
    bool transposed, Sizes output_padding, c10::SymInt groups, std::array<bool, 3> mask) {
  const int card = card_index(x, weight);
  if (in_fixed_point(x)) {
    static const auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("cnmix::fixed_convolution_backward", "")
            .typed<std::tuple<at::Tensor, at::Tensor>(
                const at::Tensor&, const at::Tensor&, const at::Tensor&, Sizes, Sizes, Sizes, bool, Sizes, c10::SymInt,
                bool, bool)>();
    auto [grad_x, grad_weight] = op.call(
        host_of(grad), host_of(x), host_of(weight), stride, padding, dilation, transposed, output_padding, groups,
        mask[0], mask[1]);
    at::Tensor grad_bias;
    if (mask[2]) {
      auto others = std::vector<int64_t>{0};
      for (int64_t i = 2; i < grad.dim(); ++i) {
        others.push_back(i);
      }
      grad_bias = to_card(host_of(grad).sum(others), card);
    }
    return {mask[0] ? to_card(grad_x, card) : at::Tensor(), mask[1] ? to_card(grad_weight, card) : at::Tensor(), grad_bias};
  }
  const int64_t channels = transposed ? weight.size(1) * groups.expect_int() : weight.size(0);
  const std::array<c10::SymInt, 1> bias{channels};
  auto [grad_x, grad_weight, grad_bias] = at::convolution_backward_symint(
      host_of(grad), host_of(x), host_of(weight), mask[2] ? std::optional<Sizes>(Sizes(bias)) : std::nullopt, stride,
      padding, dilation, transposed, output_padding, groups, mask);
  return {to_card(grad_x, card), to_card(grad_weight, card), to_card(grad_bias, card)};
}

// Between the card's world and the host's, for kernels that read pointers: no copy, and differentiable.

at::Tensor host_kernel(const at::Tensor& x) {
  return host_of(x);
}

at::Tensor card_kernel(const at::Tensor& x, int64_t card) {
  return is_on_card(x) ? x : to_card(x, static_cast<int>(card));
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
  return is_on_card(x) ? ToHost::apply(x) : x;
}

at::Tensor differentiable_card(const at::Tensor& x, int64_t card) {
  return ToCard::apply(x, card);
}

// Collectives run on the host's backend, on host views.

TORCH_LIBRARY(cnmix_card, library) {
  library.def("host(Tensor x) -> Tensor");
  library.def("card(Tensor x, int card) -> Tensor");
  library.impl("host", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(host_kernel));
  library.impl("card", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(card_kernel));
  library.impl("host", c10::DispatchKey::AutogradPrivateUse1, TORCH_FN(differentiable_host));
  library.impl("card", c10::DispatchKey::AutogradCPU, TORCH_FN(differentiable_card));
}

const std::unordered_set<std::string>& own_operators() {
  static const std::unordered_set<std::string> names{
      "empty.memory_format", "empty_strided", "_copy_from", "_copy_from_and_resize", "mm", "bmm", "addmm", "baddbmm",
      "addmv", "mv", "dot", "convolution_overrideable", "convolution_backward_overrideable", "_fused_sdp_choice"};
  return names;
}

int64_t attention_choice(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
    std::optional<double>, bool) {
  return 0;  // written out, so that its products are the card's
}

}  // namespace

}  // namespace cnmix::card

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  using namespace cnmix::card;
  library.impl("empty.memory_format", TORCH_FN(empty));
  library.impl("empty_strided", TORCH_FN(empty_strided));
  library.impl("_copy_from", TORCH_FN(copy_from));
  library.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  library.impl("mm", TORCH_FN(mm));
  library.impl("bmm", TORCH_FN(bmm));
  library.impl("mv", TORCH_FN(mv));
  library.impl("dot", TORCH_FN(dot));
  library.impl("addmm", TORCH_FN(add_product<at::addmm>));
  library.impl("baddbmm", TORCH_FN(add_product<at::baddbmm>));
  library.impl("addmv", TORCH_FN(add_product<at::addmv>));
  library.impl("convolution_overrideable", TORCH_FN(convolution));
  library.impl("convolution_backward_overrideable", TORCH_FN(convolution_backward));
  library.impl("_fused_sdp_choice", TORCH_FN(attention_choice));
}

extern "C" {

using Speak = void (*)(const char*);

static Speak speak = nullptr;

__attribute__((visibility("default"))) void cnmix_card_register(int cards, Speak say) {
  cnmix::card::settings().cards = cards;
  speak = say;
  cnmix::card::register_device();
  cnmix::card::register_operators(cnmix::card::own_operators());
}

__attribute__((visibility("default"))) void cnmix_card_set(int cards, bool strict, bool fixed_point, int64_t memory) {
  auto& settings = cnmix::card::settings();
  settings.cards = cards;
  settings.strict = strict;
  settings.fixed_point = fixed_point;
  settings.memory = memory;
}

__attribute__((visibility("default"))) int cnmix_card_current() {
  return cnmix::card::current_card();
}

__attribute__((visibility("default"))) int cnmix_card_exchange(int card) {
  return cnmix::card::set_current_card(card);
}

__attribute__((visibility("default"))) void cnmix_card_memory(int card, int64_t* counts) {
  auto& memory = cnmix::card::memory(card);
  counts[0] = memory.allocated;
  counts[1] = memory.peak;
  counts[2] = memory.allocations;
}

__attribute__((visibility("default"))) void cnmix_card_reset_peak(int card) {
  auto& memory = cnmix::card::memory(card);
  memory.peak = memory.allocated.load();
}
}

namespace cnmix::card {

void warn_once(const std::string& text) {
  static std::mutex mutex;
  static std::unordered_set<std::string> said;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!said.insert(text).second) {
      return;
    }
  }
  if (speak != nullptr) {
    speak(text.c_str());
  }
}

}  // namespace cnmix::card
