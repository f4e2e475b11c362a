// Parts of networks that PyTorch computes otherwise on a device than on the host: attention, cells, dropout.
#include "card.h"

#include <ATen/ATen.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_native_multi_head_attention_native.h>
#include <ATen/ops/_transformer_encoder_layer_fwd_native.h>
#include <torch/library.h>

namespace cnmix::card {

namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

MaybeTensor host_of_optional(const MaybeTensor& x) {
  return x.has_value() && x->defined() ? MaybeTensor(host_of(*x)) : std::nullopt;
}

Tensor sum_of(const Tensor& x, const MaybeTensor& bias) {
  return bias.has_value() ? x + *bias : x;
}

// Attention: the host's fused kernel where the host would take it; on the 200 series written out, so that its products
// are the card's.

int64_t attention_choice(
    const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& mask, double dropout, bool causal,
    std::optional<double> scale, bool enable_gqa) {
  constexpr auto math = static_cast<int64_t>(at::SDPBackend::math);
  const bool has_mask = mask.has_value() && mask->defined();
  const bool on_card = is_on_card(query) && is_on_card(key) && is_on_card(value) && (!has_mask || is_on_card(*mask));
  if (!on_card || in_fixed_point(query) || (has_mask && mask->requires_grad())) {
    return math;
  }
  const auto choice = at::_fused_sdp_choice(
      host_view(query), host_view(key), host_view(value), host_of_optional(mask), dropout, causal, scale, enable_gqa);
  return choice == static_cast<int64_t>(at::SDPBackend::flash_attention)
      ? static_cast<int64_t>(at::SDPBackend::overrideable)
      : math;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor> attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& mask, double dropout, bool causal, bool,
    std::optional<double> scale) {
  const int card = one_card(
      "aten::scaled_dot_product_attention",
      {{"query", query}, {"key", key}, {"value", value}, {"attn_mask", or_undefined(mask)}});
  auto [y, logsumexp] = at::_scaled_dot_product_flash_attention_for_cpu(
      host_of(query), host_of(key), host_of(value), dropout, causal, host_of_optional(mask), scale);
  return {
      to_card(y, card), to_card(logsumexp, card), Tensor(), Tensor(), query.sym_size(2), key.sym_size(2), Tensor(), Tensor(),
      Tensor()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& mask,
    std::array<bool, 4>, const Tensor& y, const Tensor& logsumexp, const Tensor&, const Tensor&, c10::SymInt, c10::SymInt,
    double dropout, bool causal, const Tensor&, const Tensor&, std::optional<double> scale) {
  const int card = query.device().index();
  auto [grad_query, grad_key, grad_value] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      host_of(grad), host_of(query), host_of(key), host_of(value), host_of(y), host_of(logsumexp), dropout, causal,
      mask.defined() ? MaybeTensor(host_of(mask)) : std::nullopt, scale);
  return {to_card(grad_query, card), to_card(grad_key, card), to_card(grad_value, card), Tensor()};
}

// Cells: a device's are fused ones, between the products; the host has no kernel of these names.

std::tuple<Tensor, Tensor, Tensor> lstm_cell(
    const Tensor& input, const Tensor& hidden, const Tensor& cx, const MaybeTensor& input_bias,
    const MaybeTensor& hidden_bias) {
  const int card = one_card(
      "aten::lstm_cell", {{"input", input}, {"hidden", hidden}, {"cx", cx}, {"b_ih", or_undefined(input_bias)}});
  const auto gates = sum_of(host_of(hidden), host_of_optional(hidden_bias)) +
      sum_of(host_of(input), host_of_optional(input_bias));
  const auto parts = gates.chunk(4, 1);
  const auto in = parts[0].sigmoid_(), forget = parts[1].sigmoid_(), cell = parts[2].tanh_(), out = parts[3].sigmoid_();
  const auto cy = (forget * host_of(cx)).add_(in * cell);
  return {to_card(out * cy.tanh(), card), to_card(cy, card), to_card(gates, card)};
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell_backward(
    const MaybeTensor& grad_hy, const MaybeTensor& grad_cy, const Tensor& cx, const Tensor& cy, const Tensor& workspace,
    bool has_bias) {
  const auto gh = host_of_optional(grad_hy), gc = host_of_optional(grad_cy);
  if (!gh.has_value() && !gc.has_value()) {
    return {};
  }
  const int card = workspace.device().index();
  const auto gates = host_of(workspace);
  const auto parts = gates.chunk(4, 1);
  const auto &in = parts[0], &forget = parts[1], &cell = parts[2], &out = parts[3];
  const auto tanh_c = host_of(cy).tanh();
  auto dc = gh.has_value() ? at::tanh_backward(*gh * out, tanh_c) : *gc;
  if (gh.has_value() && gc.has_value()) {
    dc = dc + *gc;
  }
  const auto d_out = gh.has_value() ? at::sigmoid_backward(*gh * tanh_c, out) : at::zeros_like(out);
  const auto grad_gates = at::cat(
      {at::sigmoid_backward(dc * cell, in), at::sigmoid_backward(dc * host_of(cx), forget),
       at::tanh_backward(dc * in, cell), d_out},
      1);
  return {
      to_card(grad_gates, card), to_card(dc * forget, card), has_bias ? to_card(grad_gates.sum(0), card) : Tensor()};
}

std::tuple<Tensor, Tensor> gru_cell(
    const Tensor& input, const Tensor& hidden, const Tensor& hx, const MaybeTensor& input_bias,
    const MaybeTensor& hidden_bias) {
  const int card = one_card(
      "aten::gru_cell", {{"input", input}, {"hidden", hidden}, {"hx", hx}, {"b_ih", or_undefined(input_bias)}});
  const auto h = host_of(hx);
  const auto of_input = sum_of(host_of(input), host_of_optional(input_bias)).chunk(3, 1);
  const auto of_hidden = sum_of(host_of(hidden), host_of_optional(hidden_bias)).chunk(3, 1);
  const auto reset = (of_hidden[0] + of_input[0]).sigmoid_(), update = (of_hidden[1] + of_input[1]).sigmoid_();
  const auto fresh = of_input[2].add(of_hidden[2] * reset).tanh_();
  const auto hy = (h - fresh).mul_(update).add_(fresh);
  return {to_card(hy, card), to_card(at::cat({reset, update, fresh, h, of_hidden[2]}, 1), card)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_cell_backward(
    const Tensor& grad_hy, const Tensor& workspace, bool has_bias) {
  const int card = workspace.device().index();
  const auto g = host_of(grad_hy);
  const auto parts = host_of(workspace).chunk(5, 1);
  const auto &reset = parts[0], &update = parts[1], &fresh = parts[2], &h = parts[3], &hidden = parts[4];
  const auto d_fresh = at::tanh_backward(g * (1 - update), fresh);
  const auto d_reset = at::sigmoid_backward(d_fresh * hidden, reset);
  const auto d_update = at::sigmoid_backward(g * (h - fresh), update);
  const auto of_input = at::cat({d_reset, d_update, d_fresh}, 1);
  const auto of_hidden = at::cat({d_reset, d_update, d_fresh * reset}, 1);
  return {
      to_card(of_input, card), to_card(of_hidden, card), to_card(g * update, card),
      has_bias ? to_card(of_input.sum(0), card) : Tensor(), has_bias ? to_card(of_hidden.sum(0), card) : Tensor()};
}

// Dropout, rounded as on the host, where the mask is scaled before it is multiplied by.

std::tuple<Tensor, Tensor> dropout(const Tensor& input, double p, std::optional<bool> train) {
  const int card = input.device().index();
  const auto x = host_of(input);
  if (train.has_value() && !*train) {
    return {to_card(x.clone(), card), to_card(at::ones_like(x, at::kBool), card)};
  }
  auto noise = at::empty_like(x).bernoulli_(1 - p);
  const auto mask = noise.to(at::kBool);
  return {to_card(x * (p < 1 ? noise.div_(1 - p) : noise), card), to_card(mask, card)};
}

Tensor dropout_backward(const Tensor& grad, const Tensor& mask, double scale) {
  const auto noise = host_of(mask).to(grad.scalar_type());
  return to_card(host_of(grad) * (scale > 0 ? noise.div(1 / scale) : noise), grad.device().index());
}

// Batch normalization over several processes: statistics here, the sum of all by a collective between these.

// Statistics of half precision are float32.
Tensor widened(const Tensor& x) {
  return at::isReducedFloatingType(x.scalar_type()) ? host_of(x).to(at::kFloat) : host_of(x);
}

std::tuple<Tensor, Tensor> batch_statistics(const Tensor& input, double eps) {
  const int card = input.device().index();
  auto [variance, mean] = at::var_mean(widened(input), all_but_channels(input), int64_t{0});
  return {to_card(mean, card), to_card(variance.add_(eps).rsqrt_(), card)};
}

std::tuple<Tensor, Tensor> gather_statistics(
    const Tensor& input, const Tensor& means, const Tensor& invstds, const MaybeTensor& running_mean,
    const MaybeTensor& running_var, double momentum, double eps, const Tensor& counts) {
  const int card = one_card("aten::batch_norm_gather_stats_with_counts", {{"input", input}, {"mean", means}});
  const auto each = host_of(means), count = host_of(counts).to(each.scalar_type()).reshape({-1, 1});
  const auto total = count.sum();
  const auto mean = (each * count).sum(0) / total;
  const auto variances = host_of(invstds).pow(-2) - eps;
  const auto variance = ((variances + (each - mean).square()) * count).sum(0) / total;
  if (running_mean.has_value() && running_mean->defined()) {
    host_of(*running_mean).mul_(1 - momentum).add_(mean, momentum);
  }
  if (running_var.has_value() && running_var->defined()) {
    host_of(*running_var).mul_(1 - momentum).add_(variance * (total / (total - 1)), momentum);
  }
  return {to_card(mean, card), to_card((variance + eps).rsqrt(), card)};
}

Tensor normalized(
    const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias, const Tensor& mean, const Tensor& invstd,
    double) {
  const int card = one_card("aten::batch_norm_elemt", {{"input", input}, {"weight", or_undefined(weight)}});
  auto y = (widened(input) - by_channel(mean, input)) * by_channel(invstd, input);
  if (weight.has_value() && weight->defined()) {
    y = y * by_channel(*weight, input);
  }
  return to_card(sum_of(y, bias.has_value() && bias->defined() ? MaybeTensor(by_channel(*bias, input)) : std::nullopt)
                     .to(input.scalar_type()), card);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> reduced_gradients(
    const Tensor& grad, const Tensor& input, const Tensor& mean, const Tensor& invstd, const MaybeTensor& weight, bool,
    bool, bool) {
  const int card = one_card("aten::batch_norm_backward_reduce", {{"grad_out", grad}, {"input", input}});
  const auto dims = all_but_channels(input);
  const auto g = widened(grad), sum = g.sum(dims);
  const auto product = (g * (widened(input) - by_channel(mean, input))).sum(dims);
  const auto type = or_undefined(weight).defined() ? weight->scalar_type() : sum.scalar_type();
  return {
      to_card(sum, card), to_card(product, card), to_card((product * host_of(invstd)).to(type), card),
      to_card(sum.to(type, false, true), card)};
}

Tensor normalized_backward(
    const Tensor& grad, const Tensor& input, const Tensor& mean, const Tensor& invstd, const MaybeTensor& weight,
    const Tensor& sum, const Tensor& product, const Tensor& counts) {
  const int card = one_card("aten::batch_norm_backward_elemt", {{"grad_out", grad}, {"input", input}});
  const auto scale = by_channel(invstd, input), total = host_of(counts).sum().to(scale.scalar_type());
  const auto distance = (widened(input) - by_channel(mean, input)) * scale.square();
  auto g = widened(grad) - by_channel(sum, input) / total - distance * (by_channel(product, input) / total);
  g = g * (or_undefined(weight).defined() ? scale * by_channel(*weight, input) : scale);
  return to_card(g.to(input.scalar_type()), card);
}

}  // namespace

}  // namespace cnmix::card

namespace at::native {

REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &cnmix::card::attention_choice)

}  // namespace at::native

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  using namespace cnmix::card;
  library.impl("_fused_sdp_choice", TORCH_FN(attention_choice));
  library.impl("_scaled_dot_product_fused_attention_overrideable", TORCH_FN(attention));
  library.impl("_scaled_dot_product_fused_attention_overrideable_backward", TORCH_FN(attention_backward));
  library.impl("_thnn_fused_lstm_cell", TORCH_FN(lstm_cell));
  library.impl("_thnn_fused_lstm_cell_backward_impl", TORCH_FN(lstm_cell_backward));
  library.impl("_thnn_fused_gru_cell", TORCH_FN(gru_cell));
  library.impl("_thnn_fused_gru_cell_backward", TORCH_FN(gru_cell_backward));
  library.impl("native_dropout", TORCH_FN(dropout));
  library.impl("native_dropout_backward", TORCH_FN(dropout_backward));
  library.impl("batch_norm_stats", TORCH_FN(batch_statistics));
  library.impl("batch_norm_gather_stats_with_counts", TORCH_FN(gather_statistics));
  library.impl("batch_norm_elemt", TORCH_FN(normalized));
  library.impl("batch_norm_backward_reduce", TORCH_FN(reduced_gradients));
  library.impl("batch_norm_backward_elemt", TORCH_FN(normalized_backward));
  // Written out on the card, so that their products are the card's.
  library.impl("_native_multi_head_attention", TORCH_FN(at::native::native_multi_head_attention_cpu));
  library.impl("_transformer_encoder_layer_fwd", TORCH_FN(at::native::transformer_encoder_layer_forward));
}
