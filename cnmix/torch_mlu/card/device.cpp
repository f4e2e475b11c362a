// What PyTorch asks of a device: cards, queues, events, pinned memory, generators.
#include "card.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/profiler/stubs/base.h>

#include <chrono>
#include <mutex>
#include <cstring>
#include <unordered_set>

namespace cnmix::card {

namespace {

thread_local int current = 0;
thread_local c10::StreamId current_queue[kMaximumCards] = {};
std::atomic<c10::StreamId> queues{0};

double now_ms() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

c10::Stream queue(int card, c10::StreamId id) {
  return c10::Stream(c10::Stream::UNSAFE, {kCard, static_cast<c10::DeviceIndex>(card)}, id);
}

// Every operation has finished when it returns, so that an event is the time of its recording.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return kCard;
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    return {kCard, static_cast<c10::DeviceIndex>(set_current_card(device.index()))};
  }
  c10::Device getDevice() const override {
    return {kCard, static_cast<c10::DeviceIndex>(current)};
  }
  void setDevice(c10::Device device) const override {
    set_current_card(device.index());
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    current = device.index() < 0 ? current : device.index();
  }
  c10::Stream getStream(c10::Device device) const override {
    const int card = card_of(device);
    return queue(card, current_queue[card]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    const int card = card_of(device);
    return queue(card, 0);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    const int card = card_of(device);
    return queue(card, ++queues);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto& id = current_queue[card_of(stream.device())];
    const c10::Stream before(c10::Stream::UNSAFE, stream.device(), id);
    id = stream.id();
    return before;
  }
  void* getStreamNativeHandle(const c10::Stream) const override {
    return nullptr;
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<double*>(event);
  }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) {
      *event = new double;
    }
    *static_cast<double*>(*event) = now_ms();
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  double elapsedTime(void* begin, void* end, const c10::DeviceIndex) const override {
    TORCH_CHECK(begin != nullptr && end != nullptr, "both events must be recorded before their elapsed time is asked");
    return *static_cast<double*>(end) - *static_cast<double*>(begin);
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return static_cast<c10::DeviceIndex>(settings().cards.load());
  }
  c10::DeviceCapability getDeviceCapability(c10::Device) const override {
    return {};
  }
};

// Host memory that says that it is pinned; nothing else about it differs.
struct PinnedAllocator final : c10::Allocator {
  struct Block {
    c10::DataPtr host;
  };
  // Never destroyed: a tensor may outlive what the process destroys when it ends.
  static std::mutex& mutex() {
    static auto& it = *new std::mutex;
    return it;
  }
  static std::unordered_set<const void*>& blocks() {
    static auto& it = *new std::unordered_set<const void*>;
    return it;
  }
  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    {
      const std::lock_guard<std::mutex> lock(mutex());
      blocks().erase(block->host.get());
    }
    delete block;
  }
  c10::DataPtr allocate(size_t bytes) override {
    auto* block = new Block{c10::GetCPUAllocator()->allocate(bytes)};
    void* data = block->host.get();
    const std::lock_guard<std::mutex> lock(mutex());
    blocks().insert(data);
    return {data, block, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

PinnedAllocator& pinned() {
  static PinnedAllocator it;
  return it;
}

// A card's generator: the host's Mersenne Twister, under the card's device. A kernel gets the host's generator within.
struct CardGenerator final : c10::GeneratorImpl {
  explicit CardGenerator(c10::DeviceIndex card, at::Generator inner)
      : c10::GeneratorImpl({kCard, card}, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)), host(std::move(inner)) {}
  void set_current_seed(uint64_t seed) override {
    host.set_current_seed(seed);
  }
  void set_offset(uint64_t offset) override {
    host.set_offset(offset);
  }
  uint64_t get_offset() const override {
    return host.get_offset();
  }
  uint64_t current_seed() const override {
    return host.current_seed();
  }
  uint64_t seed() override {
    return host.seed();
  }
  void set_state(const c10::TensorImpl& state) override {
    host.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host.unsafeGetGeneratorImpl()->get_state();
  }
  CardGenerator* clone_impl() const override {
    return new CardGenerator(device().index(), host.clone());
  }
  at::Generator host;
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return settings().cards > 0;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex card) const override {
    // The host's own default generator: an unchanged script draws the same numbers here and there.
    static std::vector<at::Generator> of_cards = [] {
      std::vector<at::Generator> made;
      for (int i = 0; i < kMaximumCards; ++i) {
        made.push_back(at::make_generator<CardGenerator>(
            static_cast<c10::DeviceIndex>(i), at::detail::getDefaultCPUGenerator()));
      }
      return made;
    }();
    return of_cards[card_of(c10::Device(kCard, card))];
  }
  at::Generator getNewGenerator(c10::DeviceIndex card) const override {
    return at::make_generator<CardGenerator>(
        static_cast<c10::DeviceIndex>(card_of(c10::Device(kCard, card))), at::detail::createCPUGenerator());
  }
  at::Device getDeviceFromPtr(void*) const override {
    return {kCard, static_cast<c10::DeviceIndex>(current)};
  }
  bool isPinnedPtr(const void* data) const override {
    const std::lock_guard<std::mutex> lock(PinnedAllocator::mutex());
    return PinnedAllocator::blocks().count(data) > 0;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return &pinned();
  }
  c10::DeviceIndex deviceCount() const override {
    return static_cast<c10::DeviceIndex>(settings().cards.load());
  }
  void setCurrentDevice(c10::DeviceIndex card) const override {
    set_current_card(card);
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return static_cast<c10::DeviceIndex>(current);
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex card) const override {
    return static_cast<c10::DeviceIndex>(set_current_card(card));
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex card) const override {
    return static_cast<c10::DeviceIndex>(card < 0 ? current : set_current_card(card));
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto* host = host_storage(storage).unsafeGetStorageImpl();
    c10::DataPtr fresh = c10::GetCPUAllocator()->allocate(bytes);
    const size_t kept = std::min(bytes, host->nbytes());
    if (kept > 0) {
      std::memcpy(fresh.get(), host->data(), kept);
    }
    host->set_data_ptr_noswap(std::move(fresh));
    host->set_nbytes(bytes);
    follow_resize(storage);
  }
};

// PyTorch's profiler asks these for the times of the card, which are the host's.
struct Profiled final : torch::profiler::impl::ProfilerStubs {
  using Event = torch::profiler::impl::ProfilerVoidEventStub;

  void record(c10::DeviceIndex* device, Event* event, int64_t* host_ns) const override {
    if (device != nullptr) {
      *device = static_cast<c10::DeviceIndex>(current);
    }
    *event = std::make_shared<double>(now_ms());
    if (host_ns != nullptr) {
      *host_ns = static_cast<int64_t>(*static_cast<double*>(event->get()) * 1e6);
    }
  }
  float elapsed(const Event* begin, const Event* end) const override {  // in microseconds
    return static_cast<float>((*static_cast<double*>(end->get()) - *static_cast<double*>(begin->get())) * 1e3);
  }
  void mark(const char*) const override {}
  void rangePush(const char*) const override {}
  void rangePop() const override {}
  bool enabled() const override {
    return true;
  }
  void onEachDevice(std::function<void(int)> each) const override {
    for (int card = 0; card < settings().cards; ++card) {
      each(card);
    }
  }
  void synchronize() const override {}
};

}  // namespace

int current_card() {
  return current;
}

int set_current_card(int card) {
  const int before = current;
  if (card >= 0) {
    check_card(card);
    current = card;
  }
  return before;
}

at::Generator host_generator(const at::Generator& generator) {
  auto* impl = dynamic_cast<CardGenerator*>(generator.unsafeGetGeneratorImpl());
  return impl == nullptr ? generator : impl->host;
}

void register_device() {
  static Guard guard;  // never destroyed before PyTorch asks the last time
  static Hooks hooks;
  static const c10::impl::DeviceGuardImplRegistrar registered(kCard, &guard);
  c10::SetAllocator(kCard, allocator());
  at::RegisterPrivateUse1HooksInterface(&hooks);
  static Profiled profiled;
  torch::profiler::impl::registerPrivateUse1Methods(&profiled);
}

}  // namespace cnmix::card
