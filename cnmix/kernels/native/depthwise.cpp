// Depthwise convolution: each channel has its own taps, so that there is no matrix product to make of it. Channels lie side
// by side and are the lanes of a vector.

#include <mutex>
#include <vector>

#include "windows.h"

// Mirrored by _Depthwise in native/__init__.py.
struct CnmixDepthwise {
  const void* x;          // (images, *size, channels)
  const void* other;      // the taps (taps, channels), or the positions' gradients (images, *output, channels)
  const CnmixWindows* windows;
  int64_t channels;
  int64_t x_bytes, other_bytes;  // of one value: 1 or 2
  float scale;
  const float* bias;      // (channels), or null
  float* out;             // (images, *output, channels), or (taps, channels)
};

namespace cnmix {
namespace {

constexpr int64_t kLanes = 64;

template <typename X, typename Sum>
CNMIX_INLINE void add_products_body(const X* x, const Sum* factors, int64_t n, Sum* sums) {
  if (n == kLanes) {
    CNMIX_INDEPENDENT
    for (int64_t i = 0; i < kLanes; ++i) sums[i] += static_cast<Sum>(x[i]) * factors[i];
  } else {
    for (int64_t i = 0; i < n; ++i) sums[i] += static_cast<Sum>(x[i]) * factors[i];
  }
}

template <typename X, typename Y, typename Sum>
CNMIX_INLINE void add_pairs_body(const X* x, const Y* y, int64_t n, Sum* sums) {
  CNMIX_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) sums[i] += static_cast<Sum>(x[i]) * static_cast<Sum>(y[i]);
}

// The pixels that the taps of a window meet; null outside the input.
template <typename X>
void find_pixels(const X* x, const CnmixWindows& w, int64_t channels, const WindowPlace& place, const X** pixels) {
  const X* image = x + place.image * w.size[0] * w.size[1] * w.size[2] * channels;
  for (int64_t k0 = 0; k0 < w.kernel[0]; ++k0) {
    const int64_t p0 = met_pixel(w, 0, place.position[0], k0);
    for (int64_t k1 = 0; k1 < w.kernel[1]; ++k1) {
      const int64_t p1 = p0 < 0 ? -1 : met_pixel(w, 1, place.position[1], k1);
      for (int64_t k2 = 0; k2 < w.kernel[2]; ++k2) {
        const int64_t p2 = p1 < 0 ? -1 : met_pixel(w, 2, place.position[2], k2);
        *pixels++ = p2 < 0 ? nullptr : image + ((p0 * w.size[1] + p1) * w.size[2] + p2) * channels;
      }
    }
  }
}

int64_t positions_of(const CnmixWindows& w) { return w.output[0] * w.output[1] * w.output[2]; }
int64_t taps_of(const CnmixWindows& w) { return w.kernel[0] * w.kernel[1] * w.kernel[2]; }

// One position, `pixels` already found.
template <typename X, typename Sum>
CNMIX_INLINE void correlate_position_body(const X* const* pixels, int64_t taps, const Sum* factors, int64_t channels,
                                          float scale, const float* bias, float* out) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t n = std::min(kLanes, channels - c);
    Sum sums[kLanes] = {};
    for (int64_t t = 0; t < taps; ++t)
      if (pixels[t]) add_products_body(pixels[t] + c, factors + t * channels + c, n, sums);
    scale_sums(sums, out + c, n, scale, bias ? bias + c : nullptr);
  }
}

#define CNMIX_CORRELATE(NAME, X, SUM)                                                                               \
  CNMIX_DISPATCH(NAME,                                                                                              \
                 (const X* const* pixels, int64_t taps, const SUM* factors, int64_t channels, float scale,          \
                  const float* bias, float* out),                                                                   \
                 (pixels, taps, factors, channels, scale, bias, out))
#define correlate_bytes_body correlate_position_body
#define correlate_words_body correlate_position_body
#define correlate_long_bytes_body correlate_position_body
CNMIX_CORRELATE(correlate_bytes, int8_t, int32_t)
CNMIX_CORRELATE(correlate_words, int16_t, int64_t)
CNMIX_CORRELATE(correlate_long_bytes, int8_t, int64_t)
void correlate_position(const int8_t* const* p, int64_t t, const int32_t* f, int64_t c, float s, const float* b, float* o) {
  correlate_bytes(p, t, f, c, s, b, o);
}
void correlate_position(const int8_t* const* p, int64_t t, const int64_t* f, int64_t c, float s, const float* b, float* o) {
  correlate_long_bytes(p, t, f, c, s, b, o);
}
void correlate_position(const int16_t* const* p, int64_t t, const int64_t* f, int64_t c, float s, const float* b, float* o) {
  correlate_words(p, t, f, c, s, b, o);
}

template <typename X, typename Factor, typename Sum>
void correlate(const CnmixDepthwise& job) {
  const CnmixWindows& w = *job.windows;
  const int64_t taps = taps_of(w), positions = w.images * positions_of(w);
  const Factor* given = static_cast<const Factor*>(job.other);
  const std::vector<Sum> factors(given, given + taps * job.channels);
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, taps * job.channels));
  parallel_for(positions, grain, [&](int64_t begin, int64_t end) {
    std::vector<const X*> pixels(static_cast<size_t>(taps));
    WindowPlace place;
    for (int64_t p = begin; p < end; ++p) {
      place.move_to(w, p);
      find_pixels(static_cast<const X*>(job.x), w, job.channels, place, pixels.data());
      correlate_position(pixels.data(), taps, factors.data(), job.channels, job.scale, job.bias,
                         job.out + p * job.channels);
    }
  });
}

// The products of one position's gradients with the pixels of its window, added up per tap.
template <typename X, typename Y, typename Sum>
CNMIX_INLINE void add_position(const X* const* pixels, int64_t taps, const Y* gradients, int64_t channels, Sum* sums) {
  for (int64_t t = 0; t < taps; ++t)
    if (pixels[t]) add_pairs_body(pixels[t], gradients, channels, sums + t * channels);
}
// As long as it fits int32, for operands of bytes.
CNMIX_INLINE void add_bytes_body(const int8_t* const* pixels, int64_t taps, const int8_t* gradients, int64_t channels,
                                 int32_t* sums) {
  add_position(pixels, taps, gradients, channels, sums);
}
CNMIX_DISPATCH(add_bytes,
               (const int8_t* const* pixels, int64_t taps, const int8_t* gradients, int64_t channels, int32_t* sums),
               (pixels, taps, gradients, channels, sums))

template <typename X, typename Y>
void correlate_all(const CnmixDepthwise& job) {
  const CnmixWindows& w = *job.windows;
  const int64_t taps = taps_of(w), positions = w.images * positions_of(w), size = taps * job.channels;
  const Y* gradients = static_cast<const Y*>(job.other);
  std::vector<int64_t> total(static_cast<size_t>(size));
  std::mutex mutex;
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, size));
  parallel_for(positions, grain, [&](int64_t begin, int64_t end) {
    constexpr bool bytes = sizeof(X) == 1 && sizeof(Y) == 1;
    constexpr int64_t kPiece = 65536;  // products of bytes whose sum fits int32
    std::vector<int64_t> sums(static_cast<size_t>(size));
    std::vector<int32_t> piece(bytes ? static_cast<size_t>(size) : 0);
    std::vector<const X*> pixels(static_cast<size_t>(taps));
    WindowPlace place;
    for (int64_t p = begin; p < end; ++p) {
      place.move_to(w, p);
      find_pixels(static_cast<const X*>(job.x), w, job.channels, place, pixels.data());
      const Y* here = gradients + p * job.channels;
      if constexpr (bytes) {
        add_bytes(pixels.data(), taps, here, job.channels, piece.data());
        if ((p - begin) % kPiece == kPiece - 1 || p == end - 1)
          for (size_t i = 0; i < piece.size(); ++i) {
            sums[i] += piece[i];
            piece[i] = 0;
          }
      } else {
        add_position(pixels.data(), taps, here, job.channels, sums.data());
      }
    }
    const std::lock_guard<std::mutex> lock(mutex);  // integers: the order does not matter
    for (size_t i = 0; i < sums.size(); ++i) total[i] += sums[i];
  });
  for (int64_t i = 0; i < size; ++i) job.out[i] = static_cast<float>(total[static_cast<size_t>(i)]) * job.scale;
}

}  // namespace
}  // namespace cnmix

using namespace cnmix;

// Multiplies each window by the taps of its channel.
CNMIX_API void cnmix_depthwise(const CnmixDepthwise* job) {
  constexpr int64_t kLongestInt32 = 131071;  // taps: 131072 * 2**14 is 2**31
  if (job->x_bytes == 1 && job->other_bytes == 1 && taps_of(*job->windows) > kLongestInt32)
    return correlate<int8_t, int8_t, int64_t>(*job);
  if (job->x_bytes == 1 && job->other_bytes == 1) return correlate<int8_t, int8_t, int32_t>(*job);
  if (job->x_bytes == 1) return correlate<int8_t, int16_t, int64_t>(*job);
  if (job->other_bytes == 1) return correlate<int16_t, int8_t, int64_t>(*job);
  correlate<int16_t, int16_t, int64_t>(*job);
}

// Multiplies the gradients of all positions by their windows: the gradient of the taps.
CNMIX_API void cnmix_depthwise_grad_weight(const CnmixDepthwise* job) {
  if (job->x_bytes == 1 && job->other_bytes == 1) return correlate_all<int8_t, int8_t>(*job);
  if (job->x_bytes == 1) return correlate_all<int8_t, int16_t>(*job);
  if (job->other_bytes == 1) return correlate_all<int16_t, int8_t>(*job);
  correlate_all<int16_t, int16_t>(*job);
}
