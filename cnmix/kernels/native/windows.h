// The windows that a convolution multiplies.
#pragma once

#include "common.h"

// Mirrored by _Windows in native/__init__.py.
struct CnmixWindows {
  int64_t images;
  int64_t run;            // bytes of one tap: channels side by side
  int64_t pixel;          // bytes from one pixel to the next: more than `run` where groups share a pixel
  int64_t size[3];        // of the input, per spatial dimension
  int64_t output[3];      // positions
  int64_t kernel[3];
  int64_t stride[3];
  int64_t dilation[3];
  int64_t before[3];      // zeros in front; negative cuts off
  int64_t step[3];        // distance of the input's pixels from each other; zeros lie between
};

namespace cnmix {

// Copies a run of bytes; the usual lengths (channels of one pixel) without a call.
inline void copy_run(uint8_t* to, const uint8_t* from, int64_t bytes) {
  int64_t i = 0;
  for (; i + 32 <= bytes; i += 32) std::memcpy(to + i, from + i, 32);
  for (; i + 8 <= bytes; i += 8) std::memcpy(to + i, from + i, 8);
  for (; i < bytes; ++i) to[i] = from[i];
}

// The pixel that one tap meets in one dimension, or -1 outside the input and between its pixels.
inline int64_t met_pixel(const CnmixWindows& w, int dim, int64_t position, int64_t tap) {
  int64_t at = position * w.stride[dim] + tap * w.dilation[dim] - w.before[dim];
  if (at < 0) return -1;
  if (w.step[dim] != 1) {
    if (at % w.step[dim] != 0) return -1;
    at /= w.step[dim];
  }
  return at < w.size[dim] ? at : -1;
}

// Where a window lies. Going on to the next one costs no divisions.
struct WindowPlace {
  int64_t index = -1, image = 0, position[3] = {0, 0, 0};

  void move_to(const CnmixWindows& w, int64_t wanted) {
    if (index < 0 || wanted != index + 1) {
      position[2] = wanted % w.output[2];
      const int64_t lines = wanted / w.output[2];
      position[1] = lines % w.output[1];
      position[0] = lines / w.output[1] % w.output[0];
      image = lines / w.output[1] / w.output[0];
    } else if (++position[2] == w.output[2]) {
      position[2] = 0;
      if (++position[1] == w.output[1]) {
        position[1] = 0;
        if (++position[0] == w.output[0]) {
          position[0] = 0;
          ++image;
        }
      }
    }
    index = wanted;
  }
};

// Gathers one window of (images, *size, channels) into (taps, channels); zeros outside the input.
inline void gather_window(const uint8_t* x, const CnmixWindows& w, const WindowPlace& place, uint8_t* to) {
  const int64_t o0 = place.position[0], o1 = place.position[1], o2 = place.position[2];
  const uint8_t* image = x + place.image * w.size[0] * w.size[1] * w.size[2] * w.pixel;
  const int64_t first = o2 * w.stride[2] - w.before[2];
  const bool dense = w.dilation[2] == 1 && w.step[2] == 1 && w.pixel == w.run && first >= 0 &&
                     first + w.kernel[2] <= w.size[2];
  const int64_t line = w.kernel[2] * w.run;
  for (int64_t k0 = 0; k0 < w.kernel[0]; ++k0) {
    const int64_t p0 = met_pixel(w, 0, o0, k0);
    for (int64_t k1 = 0; k1 < w.kernel[1]; ++k1, to += line) {
      const int64_t p1 = p0 < 0 ? -1 : met_pixel(w, 1, o1, k1);
      if (p1 < 0) {
        std::memset(to, 0, static_cast<size_t>(line));
        continue;
      }
      const uint8_t* from = image + (p0 * w.size[1] + p1) * w.size[2] * w.pixel;
      if (dense) {
        copy_run(to, from + first * w.pixel, line);
        continue;
      }
      for (int64_t k2 = 0; k2 < w.kernel[2]; ++k2) {
        const int64_t p2 = met_pixel(w, 2, o2, k2);
        if (p2 < 0)
          std::memset(to + k2 * w.run, 0, static_cast<size_t>(w.run));
        else
          copy_run(to + k2 * w.run, from + p2 * w.pixel, w.run);
      }
    }
  }
}

}  // namespace cnmix
