// Moves integers into the layouts that the integer product wants, and its sums back into float tensors.

#include "common.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace cnmix {
namespace {

// Copies a run of bytes; the usual lengths (channels of one pixel) without a call.
inline void copy_run(uint8_t* to, const uint8_t* from, int64_t bytes) {
  int64_t i = 0;
  for (; i + 32 <= bytes; i += 32) std::memcpy(to + i, from + i, 32);
  for (; i + 8 <= bytes; i += 8) std::memcpy(to + i, from + i, 8);
  for (; i < bytes; ++i) to[i] = from[i];
}

template <typename T>
void transpose_tile(const T* from, T* to, int64_t rows, int64_t columns, int64_t from_stride, int64_t to_stride) {
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = 0; r < rows; ++r) to[c * to_stride + r] = from[r * from_stride + c];
}

// (images, rows, columns) -> (images, columns, rows)
template <typename T>
void transpose(const T* from, T* to, int64_t images, int64_t rows, int64_t columns) {
  constexpr int64_t kTile = 64;
  const int64_t strips = (columns + kTile - 1) / kTile;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, rows * kTile));
  parallel_for(images * strips, grain, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t image = s / strips, c = (s % strips) * kTile;
      const T* source = from + image * rows * columns + c;
      T* target = to + image * rows * columns + c * rows;
      for (int64_t r = 0; r < rows; r += kTile)
        transpose_tile(source + r * columns, target + r, std::min(kTile, rows - r), std::min(kTile, columns - c), columns,
                       rows);
    }
  });
}

CNMIX_INLINE void to_floats_body(const int32_t* sums, shared_float* out, int64_t n, float scale, const float* bias) {
  scale_sums(sums, out, n, scale, bias);
}
CNMIX_DISPATCH(to_floats, (const int32_t* sums, shared_float* out, int64_t n, float scale, const float* bias),
               (sums, out, n, scale, bias))

// (positions, channels) of sums, `stride` apart, to (channels, positions), `to_stride` apart: one tile of a transposition.
CNMIX_INLINE void transposed_floats_body(const int32_t* sums, float* out, int64_t positions, int64_t channels,
                                         int64_t stride, int64_t to_stride, float scale, const float* bias) {
  constexpr int64_t kTile = 16;
  float tile[kTile][kTile];
  for (int64_t p = 0; p < positions; p += kTile) {
    const int64_t height = std::min(kTile, positions - p);
    for (int64_t c = 0; c < channels; c += kTile) {
      const int64_t width = std::min(kTile, channels - c);
      for (int64_t i = 0; i < height; ++i)
        for (int64_t j = 0; j < width; ++j) tile[j][i] = static_cast<float>(sums[(p + i) * stride + c + j]) * scale;
      for (int64_t j = 0; j < width; ++j) {
        float* line = out + (c + j) * to_stride + p;
        if (bias)
          for (int64_t i = 0; i < height; ++i) line[i] = tile[j][i] + bias[c + j];
        else
          std::memcpy(line, tile[j], static_cast<size_t>(height) * 4);
      }
    }
  }
}
#if defined(CNMIX_X86)
// A whole tile in registers.
CNMIX_AVX512 void transposed_tile_avx512(const int32_t* sums, float* out, int64_t stride, int64_t to_stride, float scale,
                                         const float* bias) {
  __m512 r[16], t[16];
  const __m512 factor = _mm512_set1_ps(scale);
  for (int i = 0; i < 16; ++i) r[i] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(sums + i * stride)), factor);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
      r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0xdd);
  }
  for (int j = 0; j < 16; ++j)
    _mm512_storeu_ps(out + j * to_stride, bias ? _mm512_add_ps(r[j], _mm512_set1_ps(bias[j])) : r[j]);
}
#endif

CNMIX_DISPATCH(transposed_floats,
               (const int32_t* sums, float* out, int64_t positions, int64_t channels, int64_t stride, int64_t to_stride,
                float scale, const float* bias),
               (sums, out, positions, channels, stride, to_stride, scale, bias))

}  // namespace
}  // namespace cnmix

using namespace cnmix;

// Asks for huge pages in memory that was just allocated: the first write to it then faults once in 2 MiB, not in 4 KiB.
CNMIX_API void cnmix_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

// (images, rows, columns) -> (images, columns, rows) for items of 1, 2 or 4 bytes.
CNMIX_API void cnmix_transpose(const void* from, void* to, int64_t images, int64_t rows, int64_t columns, int itemsize) {
  if (itemsize == 1)
    transpose(static_cast<const uint8_t*>(from), static_cast<uint8_t*>(to), images, rows, columns);
  else if (itemsize == 2)
    transpose(static_cast<const uint16_t*>(from), static_cast<uint16_t*>(to), images, rows, columns);
  else
    transpose(static_cast<const uint32_t*>(from), static_cast<uint32_t*>(to), images, rows, columns);
}

struct CnmixWindows {
  int64_t images;
  int64_t run;            // bytes of one pixel: its channels side by side
  int64_t size[3];        // of the input, per spatial dimension
  int64_t output[3];      // positions
  int64_t kernel[3];
  int64_t stride[3];
  int64_t dilation[3];
  int64_t before[3];      // zeros in front; negative cuts off
  int64_t step[3];        // distance of the input's pixels from each other; zeros lie between
};

// Gathers the windows of (images, *size, channels) into (images * positions, taps, channels); zeros outside the input.
CNMIX_API void cnmix_gather(const uint8_t* x, uint8_t* out, const CnmixWindows* w) {
  const int64_t taps = w->kernel[0] * w->kernel[1] * w->kernel[2];
  const int64_t rows = w->images * w->output[0] * w->output[1];  // each a line of output[2] positions
  const int64_t line = w->output[2] * taps * w->run;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, line));
  const bool dense = w->dilation[2] == 1 && w->step[2] == 1;
  parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / (w->output[0] * w->output[1]);
      const int64_t place[2] = {row / w->output[1] % w->output[0], row % w->output[1]};
      uint8_t* to = out + row * line;
      for (int64_t o = 0; o < w->output[2]; ++o) {
        for (int64_t k0 = 0; k0 < w->kernel[0]; ++k0) {
          const int64_t p0 = place[0] * w->stride[0] + k0 * w->dilation[0] - w->before[0];
          const bool in0 = p0 >= 0 && p0 % w->step[0] == 0 && p0 / w->step[0] < w->size[0];
          for (int64_t k1 = 0; k1 < w->kernel[1]; ++k1) {
            const int64_t p1 = place[1] * w->stride[1] + k1 * w->dilation[1] - w->before[1];
            const bool in1 = in0 && p1 >= 0 && p1 % w->step[1] == 0 && p1 / w->step[1] < w->size[1];
            const int64_t first = o * w->stride[2] - w->before[2];
            if (!in1) {
              std::memset(to, 0, static_cast<size_t>(w->kernel[2] * w->run));
              to += w->kernel[2] * w->run;
              continue;
            }
            const uint8_t* from =
                x + ((image * w->size[0] + p0 / w->step[0]) * w->size[1] + p1 / w->step[1]) * w->size[2] * w->run;
            if (dense && first >= 0 && first + w->kernel[2] <= w->size[2]) {
              copy_run(to, from + first * w->run, w->kernel[2] * w->run);
              to += w->kernel[2] * w->run;
              continue;
            }
            for (int64_t k2 = 0; k2 < w->kernel[2]; ++k2) {
              const int64_t p2 = first + k2 * w->dilation[2];
              if (p2 >= 0 && p2 % w->step[2] == 0 && p2 / w->step[2] < w->size[2])
                copy_run(to, from + p2 / w->step[2] * w->run, w->run);
              else
                std::memset(to, 0, static_cast<size_t>(w->run));
              to += w->run;
            }
          }
        }
      }
    }
  });
}

// Turns int32 sums (rows, columns) into floats, sum * scale (+ bias per column), in place: the buffer holds floats after.
// The scale is a power of two, so that the product is exact where it is no subnormal.
CNMIX_API void cnmix_dequantize(void* buffer, int64_t rows, int64_t columns, float scale, const float* bias) {
  int32_t* sums = static_cast<int32_t*>(buffer);
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, columns));
  parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int32_t* line = sums + row * columns;
      to_floats(line, reinterpret_cast<shared_float*>(line), columns, scale, bias);
    }
  });
}

// Turns int32 sums (images, positions, channels) into floats (images, channels, positions), as above.
CNMIX_API void cnmix_dequantize_channels_first(const int32_t* sums, float* out, int64_t images, int64_t positions,
                                               int64_t channels, float scale, const float* bias) {
  constexpr int64_t kTile = 16;
  const int64_t strips = (positions + kTile - 1) / kTile;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, channels * kTile));
  parallel_for(images * strips, grain, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t image = s / strips, first = (s % strips) * kTile, last = std::min(positions, first + kTile);
      const int32_t* from = sums + image * positions * channels;
      float* to = out + image * positions * channels;
#if defined(CNMIX_X86)
      if (active_isa == AVX512 && last - first == kTile && channels % kTile == 0) {
        for (int64_t c = 0; c < channels; c += kTile)
          transposed_tile_avx512(from + first * channels + c, to + c * positions + first, channels, positions, scale,
                                 bias ? bias + c : nullptr);
        continue;
      }
#endif
      transposed_floats(from + first * channels, to + first, last - first, channels, channels, positions, scale, bias);
    }
  });
}
