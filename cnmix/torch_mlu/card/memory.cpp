// The card's memory: the host's, counted per card.
#include "card.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>

#include <algorithm>
#include <mutex>
#include <optional>

namespace cnmix::card {

Settings& settings() {
  static Settings it;
  return it;
}

Memory& memory(int card) {
  static Memory of_cards[kMaximumCards];
  return of_cards[card];
}

namespace {

// What a card's storage is on: the host's storage with the bytes.
struct Adopted {
  c10::Storage host;
  int64_t bytes;
  int card;
};

void release(void* context) {
  auto* adopted = static_cast<Adopted*>(context);
  memory(adopted->card).allocated -= adopted->bytes;
  delete adopted;
}

std::string amount(int64_t bytes) {
  return bytes < (1 << 20) ? std::to_string(bytes) + " bytes" : std::to_string(bytes >> 20) + " MiB";
}

// Takes the bytes back, and raises, where the settings are strict.
void exceeded(int card, int64_t bytes, int64_t limit) {
  if (!settings().strict) {
    warn_once(
        "the tensors of mlu:" + std::to_string(card) + " take more than the " + amount(limit) +
        " of the card: it would be out of memory");
    return;
  }
  const int64_t before = memory(card).allocated -= bytes;
  TORCH_CHECK_WITH(
      OutOfMemoryError, false, "mlu:", card, " is out of memory: tried to allocate ", amount(bytes), " where ",
      amount(before), " of its ", amount(limit), " are taken");
}

c10::DataPtr adopt(c10::Storage host, int card) {
  const auto bytes = static_cast<int64_t>(host.nbytes());
  auto& counts = memory(card);
  const int64_t now = counts.allocated += bytes;
  if (const int64_t limit = settings().memory; limit > 0 && now > limit) {
    exceeded(card, bytes, limit);
  }
  int64_t peak = counts.peak;
  while (now > peak && !counts.peak.compare_exchange_weak(peak, now)) {
  }
  counts.allocations += 1;
  void* data = host.mutable_data();
  auto* adopted = new Adopted{std::move(host), bytes, card};
  return {data, adopted, &release, c10::Device(kCard, static_cast<c10::DeviceIndex>(card))};
}

// Memory that PyTorch calls the card's though it is not from here: writing a storage to a file makes a tensor of a bare
// address. The host has the bytes, and nothing is counted.
void take_over(c10::StorageImpl* storage) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (storage->data_ptr().get_deleter() == &release) {
    return;  // another thread was first
  }
  const auto device = storage->device();
  auto* owner = new c10::DataPtr(storage->set_data_ptr(c10::DataPtr(nullptr, device)));
  void* data = owner->get();
  auto host = c10::Storage(
      c10::Storage::use_byte_size_t(), storage->nbytes(),
      c10::DataPtr(data, owner, [](void* it) { delete static_cast<c10::DataPtr*>(it); }, c10::Device(c10::kCPU)),
      c10::GetCPUAllocator(), true);
  storage->set_data_ptr_noswap({data, new Adopted{std::move(host), 0, device.index()}, &release, device});
}

c10::Storage new_host_storage(size_t bytes) {
  auto* allocator = c10::GetCPUAllocator();
  return {c10::Storage::use_byte_size_t(), bytes, allocator->allocate(bytes), allocator, true};
}

// As ``torch.accelerator`` asks a device's allocator about its memory.
struct CardAllocator final : c10::DeviceAllocator {
  bool initialized() override {
    return true;
  }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex card) override {
    check_card(card);
    const auto& counts = memory(card);
    c10::CachingAllocator::Stat bytes;
    bytes.current = counts.allocated;
    bytes.peak = counts.peak;
    c10::CachingDeviceAllocator::DeviceStats stats;
    stats.allocated_bytes[0] = stats.reserved_bytes[0] = stats.active_bytes[0] = bytes;
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex card) override {
    check_card(card);
  }
  void resetPeakStats(c10::DeviceIndex card) override {
    check_card(card);
    auto& counts = memory(card);
    counts.peak = counts.allocated.load();
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex card) override {
    check_card(card);
    const int64_t total = settings().memory, free = total - memory(card).allocated;
    return {static_cast<size_t>(std::max<int64_t>(free, 0)), static_cast<size_t>(total)};
  }
  c10::DataPtr allocate(size_t bytes) override {
    return adopt(new_host_storage(bytes), current_card());
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

void copy_geometry(const c10::TensorImpl* from, c10::TensorImpl* to) {
  to->set_sizes_and_strides(from->sizes(), from->strides(), from->storage_offset());
  if (from->is_conj()) {
    to->_set_conj(true);
  }
  if (from->is_neg()) {
    to->_set_neg(true);
  }
  if (from->is_wrapped_number()) {
    to->set_wrapped_number(true);
  }
}

}  // namespace

c10::Allocator* allocator() {
  static CardAllocator it;
  return &it;
}

const c10::Storage& host_storage(const c10::Storage& card) {
  const auto& data = card.data_ptr();
  if (data.get_deleter() != &release) {
    take_over(card.unsafeGetStorageImpl());
  }
  return static_cast<Adopted*>(data.get_context())->host;
}

c10::Storage card_storage(const c10::Storage& host, int card) {
  return {c10::Storage::use_byte_size_t(), host.nbytes(), adopt(host, card), allocator(), true};
}

void follow_resize(const c10::Storage& card) {
  const c10::Storage host = host_storage(card);  // a reference would go with the old bytes
  auto* impl = card.unsafeGetStorageImpl();
  if (host.nbytes() != impl->nbytes() || host.data() != impl->data()) {
    impl->set_data_ptr_noswap(adopt(host, impl->device().index()));
    impl->set_nbytes(host.nbytes());
  }
}

at::Tensor host_view(const at::Tensor& x) {
  auto* impl = x.unsafeGetTensorImpl();
  // An inference tensor where it is one, whatever the mode is here: a parameter's version is counted in either.
  std::optional<c10::InferenceMode> mode;
  if (c10::InferenceMode::is_enabled() != impl->is_inference()) {
    mode.emplace(impl->is_inference());
  }
  auto view = c10::make_intrusive<c10::TensorImpl>(
      c10::Storage(host_storage(impl->storage())), c10::DispatchKeySet(c10::DispatchKey::CPU), impl->dtype());
  copy_geometry(impl, view.get());
  view->set_allow_tensor_metadata_change(impl->allow_tensor_metadata_change());
  if (!impl->is_inference() && !view->is_inference()) {
    view->set_version_counter(impl->version_counter());
  }
  return at::Tensor(std::move(view));
}

at::Tensor card_view(const at::Tensor& host, c10::Storage storage) {
  const auto* impl = host.unsafeGetTensorImpl();
  // Numbers are let pass: PyTorch's own GradScaler makes one.
  if (settings().strict && host.dim() > 0 &&
      (host.scalar_type() == c10::kDouble || host.scalar_type() == c10::kComplexDouble)) {
    warn_once("a tensor of float64 is on a card, which has no such arithmetic (the emulated one has): use float32");
  }
  auto view = c10::make_intrusive<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), impl->dtype());
  copy_geometry(impl, view.get());
  return at::Tensor(std::move(view));
}

at::Tensor to_card(const at::Tensor& x, int card) {
  if (!x.defined()) {
    return x;
  }
  TORCH_CHECK(x.layout() == c10::kStrided, "the emulated card has no ", x.layout(), " tensors: keep them on the host");
  return card_view(x, card_storage(x.storage(), card));
}

}  // namespace cnmix::card
