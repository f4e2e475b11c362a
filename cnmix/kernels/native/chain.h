// The float operations between the sums of a product and the values that it leaves, on sixteen rows of sixteen channels.
#pragma once

#include "avx512.h"
#include "plan.h"

#if defined(CNMIX_X86)

namespace cnmix {

// Sixteen rows of sums and where they belong: those that are in the output follow each other there.
struct PanelRows {
  int64_t row;            // of the output, where the first goes
  int64_t count;
  uint8_t from[2 * kTileRows];  // the sums' row of each; those beyond `count` repeat the last

  // Adds `n` rows of the sums from `first` on.
  void add(int64_t first, int64_t n) {
    for (int64_t i = 0; i < kTileRows; ++i) from[count + i] = static_cast<uint8_t>(first + i);
    count += n;
  }
  void end() {
    const uint8_t last = count ? from[count - 1] : 0;
    for (int64_t i = 0; i < kTileRows; ++i) from[count + i] = last;
  }
};

inline PanelRows whole_panel(int64_t row, int64_t count) {
  PanelRows rows{row, 0, {}};
  rows.add(0, std::min<int64_t>(kTileRows, count));
  rows.end();
  return rows;
}

CNMIX_AVX512 inline void quantize_row(int8_t* out, __m512i q) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtsepi32_epi8(q));
}
CNMIX_AVX512 inline void quantize_row(int16_t* out, __m512i q) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtsepi32_epi16(q));
}
CNMIX_AVX512 inline void quantize_part(int8_t* out, __mmask16 lanes, __m512i q) {
  _mm_mask_storeu_epi8(out, lanes, _mm512_cvtsepi32_epi8(q));
}
CNMIX_AVX512 inline void quantize_part(int16_t* out, __mmask16 lanes, __m512i q) {
  _mm256_mask_storeu_epi16(out, lanes, _mm512_cvtsepi32_epi16(q));
}

// How much of a tile there is. Where rows are missing, the last one there is comes again in their place: it is computed
// again, and goes where it is already.
enum Extent { WHOLE, ALL_CHANNELS, SOME_CHANNELS };

// Where the elements of a stage's value lie that a tile meets.
template <Extent extent>
struct Cells {
  int64_t stride, last;   // elements; row
  int64_t at(int64_t i) const { return extent == WHOLE ? i * stride : std::min(i, last) * stride; }
};

template <Extent extent, typename Out>
CNMIX_AVX512 __attribute__((always_inline)) inline void quantize_stage(const Stage& s, const __m512* v, Out* to,
                                                                       const Cells<extent>& cells, __mmask16 lanes,
                                                                       float* bad) {
  const __m512 scale = _mm512_set1_ps(s.number), rest = _mm512_set1_ps(s.other), zero = _mm512_setzero_ps();
  const __m512 high = _mm512_set1_ps(sizeof(Out) == 1 ? 127.0f : 32767.0f);
  const bool two = s.other != 1.0f;
  __m512 notes[4] = {_mm512_load_ps(bad), zero, zero, zero};
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    // Zero times a number is zero, and NaN where it is none.
    notes[i % 4] = extent == SOME_CHANNELS ? _mm512_mask3_fmadd_ps(v[i], zero, notes[i % 4], lanes)
                                           : _mm512_fmadd_ps(v[i], zero, notes[i % 4]);
    __m512 scaled = _mm512_mul_ps(v[i], scale);
    if (two) scaled = _mm512_mul_ps(scaled, rest);
    // Far below, the conversion's smallest integer is what saturates as it should; far above it has no other.
    const __m512i q =
        _mm512_cvt_roundps_epi32(_mm512_min_ps(scaled, high), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    if (extent == SOME_CHANNELS)
      quantize_part(to + cells.at(i), lanes, q);
    else
      quantize_row(to + cells.at(i), q);
  }
  _mm512_store_ps(bad, _mm512_add_ps(_mm512_add_ps(notes[0], notes[1]), _mm512_add_ps(notes[2], notes[3])));
}

// Four rows at a time, packed together.
template <Extent extent>
CNMIX_AVX512 __attribute__((always_inline)) inline void quantize_bounded(const Stage& s, const __m512* v, int8_t* to,
                                                                         const Cells<extent>& cells, __mmask16 lanes) {
  const __m512 scale = _mm512_set1_ps(s.number);
  const __m512i least = _mm512_set1_epi8(s.other != 0.0f ? 0 : -128);
  const __m512i by_rows = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const bool scaled = s.number != 1.0f;
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    __m512i q[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512 x = scaled ? _mm512_mul_ps(v[i + j], scale) : v[i + j];
      q[j] = _mm512_cvt_roundps_epi32(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
    const __m512i rows = _mm512_permutexvar_epi32(by_rows, _mm512_max_epi8(bytes, least));
    const __m128i four[4] = {_mm512_castsi512_si128(rows), _mm512_extracti32x4_epi32(rows, 1),
                             _mm512_extracti32x4_epi32(rows, 2), _mm512_extracti32x4_epi32(rows, 3)};
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      if (extent == SOME_CHANNELS)
        _mm_mask_storeu_epi8(to + cells.at(i + j), lanes, four[j]);
      else
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + cells.at(i + j)), four[j]);
    }
  }
}

// Applies the stages to `count` rows from `row` on, at `channel`.
template <Extent extent>
CNMIX_AVX512 __attribute__((always_inline)) inline void apply_chain(const Chain& chain, __m512* v, int64_t row,
                                                                    int64_t count, int64_t channel, __mmask16 lanes,
                                                                    float* bad) {
  const __m512 zero = _mm512_setzero_ps();
  for (const Stage *stage = chain.stages, *end = stage + chain.count; stage != end; ++stage) {
    const Stage& s = *stage;
    const Cells<extent> cells{s.stride, count - 1};
    const int64_t first = row * s.stride + channel;
    switch (s.kind) {
      case MULTIPLY:
      case MULTIPLY_NUMBER: {
        const __m512 by = s.kind == MULTIPLY ? _mm512_loadu_ps(s.values + channel) : _mm512_set1_ps(s.number);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) v[i] = _mm512_mul_ps(v[i], by);
        break;
      }
      case ADD: {
        const __m512 term = _mm512_loadu_ps(s.values + channel);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) v[i] = _mm512_add_ps(v[i], term);
        break;
      }
      case MULTIPLY_ADD: {
        const __m512 by = _mm512_loadu_ps(s.values + channel), term = _mm512_loadu_ps(s.terms + channel);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) v[i] = _mm512_fmadd_ps(v[i], by, term);
        break;
      }
      case ADD_VALUE: {
        const float* from = reinterpret_cast<const float*>(s.memory) + first;
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          v[i] = _mm512_add_ps(v[i], extent == SOME_CHANNELS ? _mm512_maskz_loadu_ps(lanes, from + cells.at(i))
                                                             : _mm512_loadu_ps(from + cells.at(i)));
        break;
      }
      case RELU:  // the second operand is what comes out where one is NaN, as in torch
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) v[i] = _mm512_max_ps(zero, v[i]);
        break;
      case LEAKY_RELU: {
        const __m512 slope = _mm512_set1_ps(s.number);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          v[i] = _mm512_mask_mov_ps(_mm512_mul_ps(v[i], slope), _mm512_cmp_ps_mask(v[i], zero, _CMP_GT_OQ), v[i]);
        break;
      }
      case CLAMP: {
        const __m512 low = _mm512_set1_ps(s.number), high = _mm512_set1_ps(s.other);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) v[i] = _mm512_min_ps(high, _mm512_max_ps(low, v[i]));
        break;
      }
      case STORE: {
        float* to = reinterpret_cast<float*>(s.memory) + first;
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          if (extent == SOME_CHANNELS)
            _mm512_mask_storeu_ps(to + cells.at(i), lanes, v[i]);
          else
            _mm512_storeu_ps(to + cells.at(i), v[i]);
        }
        break;
      }
      case QUANTIZE_BOUNDED:
        quantize_bounded<extent>(s, v, reinterpret_cast<int8_t*>(s.memory) + first, cells, lanes);
        break;
      case QUANTIZE_BYTES:
        quantize_stage<extent>(s, v, reinterpret_cast<int8_t*>(s.memory) + first, cells, lanes, bad);
        break;
      default:
        quantize_stage<extent>(s, v, reinterpret_cast<int16_t*>(s.memory) + first, cells, lanes, bad);
    }
  }
}

// Rounds sums, rows of `stride`, of up to sixteen channels, and applies the stages.
CNMIX_AVX512 __attribute__((noinline)) inline void finish_sums(const Chain& chain, const int32_t* sums, int64_t stride,
                                                               const PanelRows& rows, int64_t channel, int64_t width,
                                                               float* bad) {
  __m512 v[16];
  if (rows.count == kTileRows && width >= kTileRows) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) v[i] = _mm512_cvtepi32_ps(_mm512_load_si512(sums + i * stride));
    return apply_chain<WHOLE>(chain, v, rows.row, kTileRows, channel, 0xffff, bad);
  }
  if (rows.count == 0) return;
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = _mm512_cvtepi32_ps(_mm512_load_si512(sums + rows.from[i] * stride));
  if (width >= kTileRows) return apply_chain<ALL_CHANNELS>(chain, v, rows.row, rows.count, channel, 0xffff, bad);
  apply_chain<SOME_CHANNELS>(chain, v, rows.row, rows.count, channel, first_lanes(width), bad);
}

}  // namespace cnmix

#endif
