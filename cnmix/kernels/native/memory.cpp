// Memory of large results, kept for the next result of about the same size. The C library gives memory of this size back
// to the system at once, and each page of the next allocation faults and is zeroed: that can take longer than the product.

#include <cstdlib>
#include <list>
#include <mutex>

#include "common.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

// Of DLPack 0.8 (dlpack.h), the structure in which tensors are handed over with a function that takes them back.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

namespace cnmix {
namespace {

constexpr int64_t kPage = 2 << 20;          // huge pages: one fault for 2 MiB
constexpr int64_t kMostFree = int64_t{1} << 30;  // bytes that may lie idle

struct Block {
  void* data;
  int64_t bytes;
};

#if defined(__linux__)
// Straight from the system: out of the C library's heap blocks of this alignment would leave holes. Whole huge pages only,
// since a fault on the last one takes 2 MiB for what may be a few bytes.
Block allocate(int64_t bytes) {
  const int64_t whole = bytes / kPage * kPage;
  bytes = (bytes + kPage - 1) / kPage * kPage;
  const size_t mapped = static_cast<size_t>(bytes + kPage);
  void* base = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return {nullptr, bytes};
  char* data = static_cast<char*>(base);
  const int64_t head = (kPage - reinterpret_cast<intptr_t>(data) % kPage) % kPage;
  if (head > 0) munmap(data, static_cast<size_t>(head));
  data += head;
  munmap(data + bytes, static_cast<size_t>(kPage - head));
#if defined(MADV_HUGEPAGE)
  if (whole > 0) madvise(data, static_cast<size_t>(whole), MADV_HUGEPAGE);
#endif
  return {data, bytes};
}

void release(Block block) { munmap(block.data, static_cast<size_t>(block.bytes)); }
#else
Block allocate(int64_t bytes) {
  bytes = (bytes + kPage - 1) / kPage * kPage;
  return {std::aligned_alloc(kPage, static_cast<size_t>(bytes)), bytes};
}

void release(Block block) { std::free(block.data); }
#endif

class Pool {
 public:
  // The idle block that wastes least, or a new one.
  Block take(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = idle_.end();
      for (auto it = idle_.begin(); it != idle_.end(); ++it)
        if (it->bytes >= bytes && it->bytes - bytes <= bytes / 4 + kPage && (best == idle_.end() || it->bytes < best->bytes))
          best = it;
      if (best != idle_.end()) {
        const Block block = *best;
        idle_.erase(best);
        idle_bytes_ -= block.bytes;
        return block;
      }
    }
    Block block = allocate(bytes);
    if (!block.data) {  // what lies idle in other sizes may be what is missing
      trim(0);
      block = allocate(bytes);
    }
    return block;
  }

  void give(Block block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_front(block);
    idle_bytes_ += block.bytes;
    shrink(kMostFree);
  }

  void trim(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    shrink(bytes);
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  // Gives back what was not wanted for longest.
  void shrink(int64_t bytes) {
    while (idle_bytes_ > bytes) {
      idle_bytes_ -= idle_.back().bytes;
      release(idle_.back());
      idle_.pop_back();
    }
  }

  std::mutex mutex_;
  std::list<Block> idle_;
  int64_t idle_bytes_ = 0;
};

Pool& pool();

Pool* make_pool() {
#if defined(__unix__) || defined(__APPLE__)
  // A forked process has one thread: were another one inside at that moment, nobody would unlock.
  pthread_atfork([] { pool().lock(); }, [] { pool().unlock(); }, [] { pool().unlock(); });
#endif
  return new Pool;
}

Pool& pool() {
  static Pool* const forever = make_pool();  // tensors may outlive the library's static objects
  return *forever;
}

constexpr int kMostDimensions = 8;

struct Borrowed {
  DLManagedTensor managed;
  Block block;
  int64_t shape[kMostDimensions], strides[kMostDimensions];
};

void give_back(DLManagedTensor* managed) {
  Borrowed* borrowed = static_cast<Borrowed*>(managed->context);
  pool().give(borrowed->block);
  delete borrowed;
}

}  // namespace
}  // namespace cnmix

using namespace cnmix;

// Returns a DLManagedTensor on the CPU of uninitialized memory, or null where there is none. `code` is DLPack's: 0 signed
// integers, 2 floats.
CNMIX_API void* cnmix_borrow(int64_t bytes, int ndim, const int64_t* shape, const int64_t* strides, int code, int bits) {
  const Block block = pool().take(bytes);
  if (!block.data) return nullptr;
  Borrowed* borrowed = new Borrowed{};
  borrowed->block = block;
  for (int i = 0; i < ndim && i < kMostDimensions; ++i) {
    borrowed->shape[i] = shape[i];
    borrowed->strides[i] = strides[i];
  }
  borrowed->managed.tensor = {block.data, 1, 0, ndim, static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1,
                              borrowed->shape, borrowed->strides, 0};
  borrowed->managed.context = borrowed;
  borrowed->managed.deleter = give_back;
  return &borrowed->managed;
}

// Gives idle memory back to the system.
CNMIX_API void cnmix_release_memory() { pool().trim(0); }
