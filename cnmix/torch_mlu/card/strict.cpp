// What a card refuses, and what the emulated one has none of.
#include "card.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

#include <mutex>
#include <unordered_set>

namespace cnmix::card {

void refuse(const std::string& text) {
  TORCH_CHECK(!settings().strict, text);
  warn_once(text);
}

void check_card(int64_t card) {
  TORCH_CHECK(
      card >= 0 && card < settings().cards, "there is no card mlu:", card, ": this process has ", settings().cards.load(),
      " (MLU_VISIBLE_DEVICES, or cnmix run --cards N, gives it another number)");
}

int card_of(std::optional<c10::Device> device) {
  const int card = device.has_value() && device->index() >= 0 ? device->index() : current_card();
  check_card(card);
  return card;
}

std::string from_host_text(const std::string& op, const std::string& argument, int card) {
  const auto name = "mlu:" + std::to_string(card);
  return op + " got its argument " + argument + " from the host and others from " + name +
      ": a card refuses that; bring it there with .to('" + name + "')";
}

// Never destroyed: a thread that outlives the interpreter may still come here.
void warn_once(const std::string& text) {
  static auto& mutex = *new std::mutex;
  static auto& said = *new std::unordered_set<std::string>;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!said.insert(text).second) {
      return;
    }
  }
  say(text.c_str());
}

void check_result(const std::string& op, const at::Tensor& x) {
  const char* kind = nullptr;
  if (x.is_nested()) {
    kind = "nested";
  } else if (x.layout() != c10::kStrided) {
    kind = "sparse";
  } else if (x.is_quantized()) {
    kind = "quantized";
  }
  TORCH_CHECK(
      kind == nullptr, op, " gives a ", kind, " tensor, and the emulated card has none: compute it on the host, from .cpu()");
}

// Whether a card refuses this tensor beside its own. It takes numbers from the host, and wants some arguments there.
bool is_refused(const std::string& op, const std::string& argument, const at::Tensor& x, bool written) {
  static const std::unordered_set<std::string> joining{"aten::cat", "aten::stack"};
  static const std::unordered_set<std::string> taken{
      "aten::index.indices", "aten::_unsafe_index.indices", "aten::index_put.indices", "aten::index_put_.indices",
      "aten::_unsafe_index_put.indices", "aten::_index_put_impl_.indices", "aten::_index_put_impl.indices",
      "aten::_pack_padded_sequence.lengths", "aten::_ctc_loss.input_lengths", "aten::_ctc_loss.target_lengths",
      "aten::_ctc_loss_backward.input_lengths", "aten::_ctc_loss_backward.target_lengths"};
  if (x.device().type() != c10::kCPU) {
    return false;
  }
  if (x.dim() == 0 && !written) {
    return joining.count(op) > 0;
  }
  return taken.count(op + "." + argument) == 0;
}

namespace {

void has_none(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK(
      false, op.schema().name(), ": the emulated card has no sparse, quantized or nested tensors; keep them on the host");
}

// Whether all are left-aligned is asked before nested tensors are taken for padded ones: without, modules go on padded.
bool no_nested(const at::Tensor&, const at::Tensor&) {
  return false;
}

}  // namespace

}  // namespace cnmix::card

TORCH_LIBRARY_IMPL(_, SparsePrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&cnmix::card::has_none>());
}

TORCH_LIBRARY_IMPL(_, SparseCsrPrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&cnmix::card::has_none>());
}

TORCH_LIBRARY_IMPL(_, QuantizedPrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&cnmix::card::has_none>());
}

TORCH_LIBRARY_IMPL(_, NestedTensorPrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&cnmix::card::has_none>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("_nested_tensor_from_mask_left_aligned", TORCH_FN(cnmix::card::no_nested));
}
