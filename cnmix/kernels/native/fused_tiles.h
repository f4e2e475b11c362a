// The innermost loops of a plan's products: 32 x 32 sums of rows that need not be packed by panels that are.
#pragma once

#include "tiles.h"

#if defined(CNMIX_X86)

namespace cnmix {

// Up to two panels of rows, and of columns. Tile t of a panel of rows starts `offsets[t]` bytes behind it.
struct Strips {
  const uint8_t *a[2], *b[2];  // the second may be null
  int64_t stride;              // bytes from one row to the next
  const int64_t* offsets;
  int64_t tiles;
};

#if defined(CNMIX_HAS_AMX)

// Adds the products of one tile of K.
template <bool two_rows, bool two_columns>
CNMIX_AMX __attribute__((always_inline)) inline void add_tile(const Strips& s, int64_t t) {
  const int64_t at = s.offsets[t], b = t * kTileBytes;
  _tile_loadd(6, s.b[0] + b, 64);
  _tile_loadd(4, s.a[0] + at, s.stride);
  _tile_dpbssd(0, 4, 6);
  if (two_rows) {
    _tile_loadd(5, s.a[1] + at, s.stride);
    _tile_dpbssd(2, 5, 6);
  }
  if (two_columns) {
    _tile_loadd(7, s.b[1] + b, 64);
    _tile_dpbssd(1, 4, 7);
    if (two_rows) _tile_dpbssd(3, 5, 7);
  }
}

#endif

// Eight rows: up to sixteen sums in registers. `a` holds 128 more than the signed values, which the sums begin with.
template <int columns>
CNMIX_VNNI __attribute__((always_inline)) inline void multiply_eight(const uint8_t* a, const Strips& s,
                                                                     const int32_t* const* corrections,
                                                                     int32_t* out0, int32_t* out1) {
  const int64_t stride = s.stride;
  const uint8_t *b0 = s.b[0], *b1 = s.b[1];
  __m512i sums[8][columns];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < columns; ++c) sums[r][c] = _mm512_loadu_si512(corrections[c]);
  for (int64_t t = 0; t < s.tiles; ++t, b0 += kTileBytes, b1 += columns > 1 ? kTileBytes : 0) {
    const uint8_t* from = a + s.offsets[t];
    for (int q = 0; q < 16; ++q, from += 4) {
      __m512i right[columns];
      right[0] = _mm512_loadu_si512(b0 + 64 * q);
      if (columns > 1) right[columns - 1] = _mm512_loadu_si512(b1 + 64 * q);
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) {
        int32_t four;
        std::memcpy(&four, from + r * stride, 4);
        const __m512i left = _mm512_set1_epi32(four);
#pragma GCC unroll 2
        for (int c = 0; c < columns; ++c) sums[r][c] = _mm512_dpbusd_epi32(sums[r][c], left, right[c]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) {
    _mm512_storeu_si512(out0 + 16 * r, sums[r][0]);
    if (columns > 1) _mm512_storeu_si512(out1 + 16 * r, sums[r][columns - 1]);
  }
}

CNMIX_VNNI inline void multiply_strips_vnni(const Strips& s, const int32_t* const* corrections, TileSums& sums) {
  for (int i = 0; i < 2 && s.a[i]; ++i)
    for (int half = 0; half < 2; ++half) {
      const uint8_t* a = s.a[i] + 8 * half * s.stride;
      if (s.b[1])
        multiply_eight<2>(a, s, corrections, sums[i][0][8 * half], sums[i][1][8 * half]);
      else
        multiply_eight<1>(a, s, corrections, sums[i][0][8 * half], nullptr);
    }
}

}  // namespace cnmix

#endif
