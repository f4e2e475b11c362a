// Memory that a thread keeps from call to call.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace cnmix {

// Fresh memory would fault page by page each time.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  // Null where there is none.
  uint8_t* get(int64_t bytes) {
    if (bytes > size_) {
      release();
      const int64_t whole = (bytes + 4095) / 4096 * 4096;
      data_ = static_cast<uint8_t*>(std::aligned_alloc(4096, static_cast<size_t>(whole)));
      size_ = data_ ? whole : 0;
    }
    return data_;
  }
  void release() {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }
  int64_t size() const { return size_; }

 private:
  uint8_t* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace cnmix
