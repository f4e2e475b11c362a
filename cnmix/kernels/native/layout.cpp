// Moves integers into the layouts that the integer product wants, and its sums back into float tensors.

#include "avx512.h"
#include "windows.h"

namespace cnmix {
namespace {

template <typename T>
void transpose_tile(const T* from, T* to, int64_t rows, int64_t columns, int64_t from_stride, int64_t to_stride) {
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = 0; r < rows; ++r) to[c * to_stride + r] = from[r * from_stride + c];
}

#if defined(CNMIX_X86)
// Bytes, sixteen by sixteen: four rounds of interleaving (SSE2, which every x86-64 has).
void transpose_tile(const uint8_t* from, uint8_t* to, int64_t rows, int64_t columns, int64_t from_stride,
                    int64_t to_stride) {
  constexpr int64_t kSide = 16;
  const int64_t whole_rows = rows / kSide * kSide, whole_columns = columns / kSide * kSide;
  for (int64_t c = 0; c < whole_columns; c += kSide)
    for (int64_t r = 0; r < whole_rows; r += kSide) {
      __m128i a[16], b[16];
      for (int i = 0; i < 16; ++i)
        a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + (r + i) * from_stride + c));
      for (int round = 0; round < 4; ++round) {
        for (int i = 0; i < 8; ++i) {
          b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
          b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
        }
        std::memcpy(a, b, sizeof(a));
      }
      for (int i = 0; i < 16; ++i)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (c + i) * to_stride + r), a[i]);
    }
  transpose_tile<uint8_t>(from + whole_columns, to + whole_columns * to_stride, rows, columns - whole_columns,
                          from_stride, to_stride);
  transpose_tile<uint8_t>(from + whole_rows * from_stride, to + whole_rows, rows - whole_rows, whole_columns,
                          from_stride, to_stride);
}

CNMIX_AVX512 void transpose_words_avx512(const uint32_t* from, uint32_t* to, int64_t from_stride, int64_t to_stride) {
  __m512i r[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * from_stride);
  transpose_registers(r);
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * to_stride, r[i]);
}

void transpose_tile(const uint32_t* from, uint32_t* to, int64_t rows, int64_t columns, int64_t from_stride,
                    int64_t to_stride) {
  constexpr int64_t kSide = 16;
  const bool wide = active_isa >= AVX512;
  const int64_t whole_rows = wide ? rows / kSide * kSide : 0, whole_columns = wide ? columns / kSide * kSide : 0;
  for (int64_t c = 0; c < whole_columns; c += kSide)
    for (int64_t r = 0; r < whole_rows; r += kSide)
      transpose_words_avx512(from + r * from_stride + c, to + c * to_stride + r, from_stride, to_stride);
  transpose_tile<uint32_t>(from + whole_columns, to + whole_columns * to_stride, rows, columns - whole_columns,
                           from_stride, to_stride);
  transpose_tile<uint32_t>(from + whole_rows * from_stride, to + whole_rows, rows - whole_rows, whole_columns,
                           from_stride, to_stride);
}
#endif

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
  __m512 r[16];
  const __m512 factor = _mm512_set1_ps(scale);
  for (int i = 0; i < 16; ++i) r[i] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(sums + i * stride)), factor);
  transpose_registers(reinterpret_cast<__m512i*>(r));
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

// (images, rows, columns) -> (images, columns, rows) for items of 1, 2 or 4 bytes.
CNMIX_API void cnmix_transpose(const void* from, void* to, int64_t images, int64_t rows, int64_t columns, int itemsize) {
  if (itemsize == 1)
    transpose(static_cast<const uint8_t*>(from), static_cast<uint8_t*>(to), images, rows, columns);
  else if (itemsize == 2)
    transpose(static_cast<const uint16_t*>(from), static_cast<uint16_t*>(to), images, rows, columns);
  else
    transpose(static_cast<const uint32_t*>(from), static_cast<uint32_t*>(to), images, rows, columns);
}

// Gathers the windows of (images, *size, channels) into (images * positions, taps, channels); zeros outside the input.
CNMIX_API void cnmix_gather(const uint8_t* x, uint8_t* out, const CnmixWindows* w) {
  const int64_t line = w->kernel[0] * w->kernel[1] * w->kernel[2] * w->run;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, line));
  parallel_for(w->images * w->output[0] * w->output[1] * w->output[2], grain, [&](int64_t begin, int64_t end) {
    WindowPlace place;
    for (int64_t index = begin; index < end; ++index) {
      place.move_to(*w, index);
      gather_window(x, *w, place, out + index * line);
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
      if (active_isa >= AVX512 && last - first == kTile && channels % kTile == 0) {
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
