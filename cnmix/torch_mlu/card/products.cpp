// Products: on a card that multiplies floats the host's, on the 200 series those of int31, whose kernels Python has.
#include "card.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/Resize.h>
#include <torch/library.h>

namespace cnmix::card {

int one_card(const char* op, std::initializer_list<Named> arguments) {
  int card = -1;
  for (const auto& each : arguments) {
    if (is_on_card(each.x)) {
      const int index = each.x.device().index();
      TORCH_CHECK(
          card < 0 || card == index, op, " got its argument ", each.name, " from mlu:", index, " and others from mlu:",
          card, ": bring them to one card with .to()");
      card = index;
    }
  }
  for (const auto& each : arguments) {
    if (each.x.defined() && !is_on_card(each.x) && each.x.dim() > 0) {  // a number becomes the card's by itself
      refuse(from_host_text(op, each.name, card));
    }
  }
  return card;
}

std::vector<int64_t> all_but_channels(const at::Tensor& x) {
  auto dims = std::vector<int64_t>{0};
  for (int64_t i = 2; i < x.dim(); ++i) {
    dims.push_back(i);
  }
  return dims;
}

at::Tensor by_channel(const at::Tensor& value, const at::Tensor& x) {
  auto shape = std::vector<int64_t>(static_cast<size_t>(x.dim()), 1);
  shape[1] = -1;
  return host_of(value).reshape(shape);
}

namespace {

using at::Scalar;
using at::Tensor;
using Sizes = c10::SymIntArrayRef;

template <typename Signature>
auto python_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Tensor fixed_matmul(const Tensor& a, const Tensor& b) {
  static const auto op = python_operator<Tensor(const Tensor&, const Tensor&)>("cnmix::fixed_matmul");
  return op.call(a, b);
}

// What tells two products of matrices apart: their dimensions, and the host's operator.
struct Form {
  const char* op;
  int64_t left, right;
};

void check_dimensions(const Form& form, const Tensor& a, const Tensor& b) {
  TORCH_CHECK(
      a.dim() == form.left && b.dim() == form.right, form.op, " multiplies a tensor of ", form.left, " dimensions by one of ",
      form.right, ", got ", a.sizes(), " and ", b.sizes());
}

template <typename OnHost>
Tensor product(const Form& form, const Tensor& a, const Tensor& b, OnHost on_host) {
  const int card = one_card(form.op, {{"self", a}, {"mat2", b}});
  const auto x = host_of(a), y = host_of(b);
  if (!in_fixed_point(x)) {
    return to_card(on_host(x, y), card);
  }
  check_dimensions(form, x, y);
  return to_card(fixed_matmul(x, y), card);
}

// beta * bias + alpha * (a @ b); of batches the sum where the bias is a matrix.
template <typename OnHost>
Tensor add_product(
    const Form& form, const Tensor& bias, const Tensor& a, const Tensor& b, const Scalar& beta, const Scalar& alpha,
    bool summed, OnHost on_host) {
  const int card = one_card(form.op, {{"self", bias}, {"mat1", a}, {"mat2", b}});
  const auto z = host_of(bias), x = host_of(a), y = host_of(b);
  if (!in_fixed_point(x)) {
    return to_card(on_host(z, x, y, beta, alpha), card);
  }
  check_dimensions(form, x, y);
  TORCH_CHECK(
      z.scalar_type() == x.scalar_type(), form.op, " got a tensor of ", z.scalar_type(), " to add to a product of ",
      x.scalar_type(), ": convert it with .to()");
  auto sum = fixed_matmul(x, y);
  sum = summed ? sum.sum(0) : sum;
  if (!alpha.equal(1)) {
    sum.mul_(alpha);
  }
  if (!beta.equal(0)) {  // else what it holds is of no account, NaN included
    sum.add_(z, beta);
  }
  return to_card(sum, card);
}

Tensor mm(const Tensor& a, const Tensor& b) {
  return product({"aten::mm", 2, 2}, a, b, [](const Tensor& x, const Tensor& y) { return at::mm(x, y); });
}

Tensor bmm(const Tensor& a, const Tensor& b) {
  return product({"aten::bmm", 3, 3}, a, b, [](const Tensor& x, const Tensor& y) { return at::bmm(x, y); });
}

Tensor mv(const Tensor& a, const Tensor& b) {
  return product({"aten::mv", 2, 1}, a, b, [](const Tensor& x, const Tensor& y) { return at::mv(x, y); });
}

Tensor dot(const Tensor& a, const Tensor& b) {
  return product({"aten::dot", 1, 1}, a, b, [](const Tensor& x, const Tensor& y) { return at::dot(x, y); });
}

Tensor vdot(const Tensor& a, const Tensor& b) {
  return product({"aten::vdot", 1, 1}, a, b, [](const Tensor& x, const Tensor& y) { return at::vdot(x, y); });
}

#define ADD_PRODUCT(name, left, right, summed)                                                                      \
  Tensor name(const Tensor& bias, const Tensor& a, const Tensor& b, const Scalar& beta, const Scalar& alpha) {      \
    const auto on_host = [](const Tensor& z, const Tensor& x, const Tensor& y, const Scalar& c, const Scalar& d) {  \
      return at::name(z, x, y, c, d);                                                                               \
    };                                                                                                              \
    return add_product({"aten::" #name, left, right}, bias, a, b, beta, alpha, summed, on_host);                    \
  }

ADD_PRODUCT(addmm, 2, 2, false)
ADD_PRODUCT(addmv, 2, 1, false)
ADD_PRODUCT(baddbmm, 3, 3, false)
ADD_PRODUCT(addbmm, 3, 3, true)

Tensor addmm_activation(
    const Tensor& bias, const Tensor& a, const Tensor& b, const Scalar& beta, const Scalar& alpha, bool use_gelu) {
  auto y = card::addmm(bias, a, b, beta, alpha);  // not at::addmm
  return use_gelu ? at::gelu(y) : at::relu_(y);
}

Tensor& write(const char* op, const Tensor& result, Tensor& out) {
  one_card(op, {{"self", result}, {"out", out}});
  TORCH_CHECK(
      out.scalar_type() == result.scalar_type(), "Expected out tensor to have dtype ", result.scalar_type(), ", but got ",
      out.scalar_type(), " instead");
  at::native::resize_output(out, result.sizes());
  host_of(out).copy_(host_of(result));
  return out;
}

// The out form of a function.
template <auto function>
struct Into;

template <typename... Arguments, Tensor (*function)(Arguments...)>
struct Into<function> {
  static Tensor& call(Arguments... arguments, Tensor& out) {
    return write("a product's out form", function(arguments...), out);
  }
};

// The in-place form of an ``add_product``.
template <Tensor (*function)(const Tensor&, const Tensor&, const Tensor&, const Scalar&, const Scalar&)>
Tensor& in_place(Tensor& self, const Tensor& a, const Tensor& b, const Scalar& beta, const Scalar& alpha) {
  const auto result = function(self, a, b, beta, alpha);
  TORCH_CHECK(
      self.sizes() == result.sizes(), "a product of shape ", result.sizes(), " cannot be added in place to a tensor of shape ",
      self.sizes());
  return write("a product's in-place form", result, self);
}

void check_bias(const Tensor& bias, const Tensor& x) {
  TORCH_CHECK(
      !bias.defined() || bias.scalar_type() == x.scalar_type(), "a convolution of ", x.scalar_type(), " got a bias of ",
      bias.scalar_type(), ": convert it with .to()");
}

Tensor convolution(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, Sizes stride, Sizes padding, Sizes dilation,
    bool transposed, Sizes output_padding, c10::SymInt groups) {
  const auto& b = or_undefined(bias);
  const int card = one_card("aten::convolution", {{"input", x}, {"weight", weight}, {"bias", b}});
  const auto z = host_of(b);
  if (!in_fixed_point(x)) {
    return to_card(
        at::convolution_symint(
            host_of(x), host_of(weight), z.defined() ? std::optional<Tensor>(z) : std::nullopt, stride, padding, dilation,
            transposed, output_padding, groups),
        card);
  }
  check_bias(z, x);
  static const auto op =
      python_operator<Tensor(const Tensor&, const Tensor&, Sizes, Sizes, Sizes, bool, Sizes, c10::SymInt)>(
          "cnmix::fixed_convolution");
  auto y = op.call(host_of(x), host_of(weight), stride, padding, dilation, transposed, output_padding, groups);
  if (z.defined()) {
    y.add_(by_channel(z, y));
  }
  return to_card(y, card);
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, Sizes stride, Sizes padding, Sizes dilation, bool transposed,
    Sizes output_padding, c10::SymInt groups, std::array<bool, 3> mask) {
  const int card =
      one_card("aten::convolution_backward", {{"grad_output", grad}, {"input", x}, {"weight", weight}});
  const auto g = host_of(grad);
  if (!in_fixed_point(x)) {
    const std::array<c10::SymInt, 1> bias{grad.sym_size(1)};
    auto [grad_x, grad_weight, grad_bias] = at::convolution_backward_symint(
        g, host_of(x), host_of(weight), mask[2] ? std::optional<Sizes>(Sizes(bias)) : std::nullopt, stride, padding,
        dilation, transposed, output_padding, groups, mask);
    return {to_card(grad_x, card), to_card(grad_weight, card), to_card(grad_bias, card)};
  }
  Tensor grad_x, grad_weight, grad_bias;
  if (mask[0] || mask[1]) {
    static const auto op = python_operator<std::tuple<Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, Sizes, Sizes, Sizes, bool, Sizes, c10::SymInt, bool, bool)>(
        "cnmix::fixed_convolution_backward");
    std::tie(grad_x, grad_weight) = op.call(
        g, host_of(x), host_of(weight), stride, padding, dilation, transposed, output_padding, groups, mask[0], mask[1]);
  }
  if (mask[2]) {
    grad_bias = g.sum(all_but_channels(g));
  }
  return {
      mask[0] ? to_card(grad_x, card) : Tensor(), mask[1] ? to_card(grad_weight, card) : Tensor(), to_card(grad_bias, card)};
}

}  // namespace

}  // namespace cnmix::card

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  using namespace cnmix::card;
  library.impl("mm", TORCH_FN(mm));
  library.impl("mm.out", TORCH_FN(Into<&mm>::call));
  library.impl("bmm", TORCH_FN(bmm));
  library.impl("bmm.out", TORCH_FN(Into<&bmm>::call));
  library.impl("mv", TORCH_FN(mv));
  library.impl("dot", TORCH_FN(dot));
  library.impl("vdot", TORCH_FN(vdot));
  library.impl("addmm", TORCH_FN(addmm));
  library.impl("addmm.out", TORCH_FN(Into<&addmm>::call));
  library.impl("addmm_", TORCH_FN(in_place<&addmm>));
  library.impl("addmv", TORCH_FN(addmv));
  library.impl("addmv.out", TORCH_FN(Into<&addmv>::call));
  library.impl("addmv_", TORCH_FN(in_place<&addmv>));
  library.impl("baddbmm", TORCH_FN(baddbmm));
  library.impl("baddbmm.out", TORCH_FN(Into<&baddbmm>::call));
  library.impl("baddbmm_", TORCH_FN(in_place<&baddbmm>));
  library.impl("addbmm", TORCH_FN(addbmm));
  library.impl("addbmm.out", TORCH_FN(Into<&addbmm>::call));
  library.impl("addbmm_", TORCH_FN(in_place<&addbmm>));
  library.impl("_addmm_activation", TORCH_FN(addmm_activation));
  library.impl("convolution_overrideable", TORCH_FN(convolution));
  library.impl("convolution_backward_overrideable", TORCH_FN(convolution_backward));
}
