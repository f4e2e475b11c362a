// The emulated card: a private-use device of PyTorch whose memory is the host's.
//
// A tensor there has the device's dispatch key and a storage on the device, so that all of PyTorch sees a device that is
// not the host. Under that storage is one of the host with the same bytes: a kernel of the host computes on a second
// tensor, the host view, which has it.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/Storage.h>

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

namespace cnmix::card {

constexpr auto kCard = c10::DeviceType::PrivateUse1;
constexpr int kMaximumCards = 64;

// What a caller sets, and what counts up while it runs.
struct Settings {
  std::atomic<int> cards{1};
  std::atomic<bool> strict{false};
  // Whether products of float tensors run as int31, as on the 200 series.
  std::atomic<bool> fixed_point{false};
  // In bytes, of each card; 0 is without end.
  std::atomic<int64_t> memory{0};
};
Settings& settings();

struct Memory {
  std::atomic<int64_t> allocated{0}, peak{0}, allocations{0};
};
Memory& memory(int card);

int current_card();
int set_current_card(int card);  // returns the one before

c10::Allocator* allocator();
// The host's storage under a card's, which shares its bytes; and a card's on a storage of the host.
const c10::Storage& host_storage(const c10::Storage& card);
c10::Storage card_storage(const c10::Storage& host, int card);
// Gives a card's storage the bytes that its host storage has since it was resized.
void follow_resize(const c10::Storage& card);

inline bool is_on_card(const at::Tensor& x) {
  return x.defined() && x.device().type() == kCard;
}
// A tensor of the host on the same bytes, with the same version counter.
at::Tensor host_view(const at::Tensor& x);
// The same of a card's tensor, and a host tensor itself.
inline at::Tensor host_of(const at::Tensor& x) {
  return is_on_card(x) ? host_view(x) : x;
}
// Whether products of this tensor run as int31.
inline bool in_fixed_point(const at::Tensor& x) {
  return settings().fixed_point && at::isFloatingType(x.scalar_type()) && x.layout() == c10::kStrided;
}
struct Named {
  const char* name;
  const at::Tensor& x;
};
// Checks that an operator's arguments are on one card, as it would; returns which.
int one_card(const char* op, std::initializer_list<Named> arguments);

// The dimensions of (N, C, *spatial) but that of the channels.
std::vector<int64_t> all_but_channels(const at::Tensor& x);
// A value for each channel, on the host, in the shape that goes with x.
at::Tensor by_channel(const at::Tensor& value, const at::Tensor& x);

// A tensor of the card on the bytes of a host tensor.
at::Tensor to_card(const at::Tensor& x, int card);
// The same on a storage that the card has already.
at::Tensor card_view(const at::Tensor& host, c10::Storage storage);

// Raises where the settings are strict; else says a line once for each text.
void refuse(const std::string& text);
// Raises if there is no such card.
void check_card(int64_t card);
// The card that a factory's argument names, which must be there: the current one where it names none.
int card_of(std::optional<c10::Device> device);
// What is wrong with a host tensor among the card's, for ``refuse``.
std::string from_host_text(const std::string& op, const std::string& argument, int card);
inline const at::Tensor& or_undefined(const std::optional<at::Tensor>& x) {
  static const at::Tensor undefined;
  return x.has_value() ? *x : undefined;
}
// Raises if it is of a kind that a card has none of: sparse, quantized, nested.
void check_result(const std::string& op, const at::Tensor& x);

// Says a line once for each text, by Python's logging where it was set up.
void warn_once(const std::string& text);
void say(const char* text);

}  // namespace cnmix::card
