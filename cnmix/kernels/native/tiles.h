// The innermost loops of the integer product: 32 x 32 sums of packed panels, on the processor's integer units.
#pragma once

#include "panels.h"

#if defined(CNMIX_X86)

namespace cnmix {

// Two panels of each side, tile by tile along K. The second may be null: then there is one.
struct Panels {
  const uint8_t *a[2], *b[2];
  int64_t tiles;
};

// [a panel][b panel][16 rows][16 columns]
typedef int32_t TileSums[2][2][kTileRows][kTileRows];

#if defined(CNMIX_HAS_AMX)

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

CNMIX_AMX inline void configure_tiles() {
  // Static: GCC's intrinsic tells the compiler of eight of the bytes that it reads, and stores to the others get lost.
  static const TileConfig config;
  _tile_loadconfig(&config);
}
CNMIX_AMX inline void release_tiles() { _tile_release(); }

CNMIX_AMX inline void zero_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

CNMIX_AMX inline void store_tiles(TileSums& sums) {
  _tile_stored(0, sums[0][0], 64);
  _tile_stored(1, sums[0][1], 64);
  _tile_stored(2, sums[1][0], 64);
  _tile_stored(3, sums[1][1], 64);
}

// Adds the products of one digit of each side; the highest digit of a number is signed, the others are not.
#define CNMIX_AMX_LOOP(NAME, MULTIPLY)                                      \
  CNMIX_AMX inline void NAME(const Panels& p) {                             \
    const uint8_t *a0 = p.a[0], *a1 = p.a[1], *b0 = p.b[0], *b1 = p.b[1];   \
    if (a1 && b1) {                                                         \
      for (int64_t t = 0; t < p.tiles; ++t) {                               \
        _tile_loadd(6, b0 + t * kTileBytes, 64);                            \
        _tile_loadd(4, a0 + t * kTileBytes, 64);                            \
        MULTIPLY(0, 4, 6);                                                  \
        _tile_loadd(5, a1 + t * kTileBytes, 64);                            \
        MULTIPLY(2, 5, 6);                                                  \
        _tile_loadd(7, b1 + t * kTileBytes, 64);                            \
        MULTIPLY(1, 4, 7);                                                  \
        MULTIPLY(3, 5, 7);                                                  \
      }                                                                     \
      return;                                                               \
    }                                                                       \
    for (int64_t t = 0; t < p.tiles; ++t) {                                 \
      _tile_loadd(4, a0 + t * kTileBytes, 64);                              \
      _tile_loadd(6, b0 + t * kTileBytes, 64);                              \
      MULTIPLY(0, 4, 6);                                                    \
      if (a1) {                                                             \
        _tile_loadd(5, a1 + t * kTileBytes, 64);                            \
        MULTIPLY(2, 5, 6);                                                  \
      }                                                                     \
      if (b1) {                                                             \
        _tile_loadd(7, b1 + t * kTileBytes, 64);                            \
        MULTIPLY(1, 4, 7);                                                  \
      }                                                                     \
    }                                                                       \
  }
CNMIX_AMX_LOOP(add_signed_signed, _tile_dpbssd)
CNMIX_AMX_LOOP(add_signed_unsigned, _tile_dpbsud)
CNMIX_AMX_LOOP(add_unsigned_signed, _tile_dpbusd)
CNMIX_AMX_LOOP(add_unsigned_unsigned, _tile_dpbuud)
#undef CNMIX_AMX_LOOP

CNMIX_AMX inline void add_digits_amx(const Panels& p, bool a_signed, bool b_signed) {
  if (a_signed)
    b_signed ? add_signed_signed(p) : add_signed_unsigned(p);
  else
    b_signed ? add_unsigned_signed(p) : add_unsigned_unsigned(p);
}

#endif

// Eight rows and two panels of columns: sixteen sums in registers. `b` holds 128 more than the signed values.
CNMIX_VNNI inline void multiply_half_vnni(const uint8_t* a, const uint8_t* b0, const uint8_t* b1, int64_t tiles,
                                          int32_t* out0, int32_t* out1) {
  __m512i sums[8][2];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
  for (int64_t t = 0; t < tiles; ++t, a += kTileBytes, b0 += kTileBytes, b1 += kTileBytes)
    for (int q = 0; q < 16; ++q) {
      const __m512i left = _mm512_loadu_si512(b0 + 64 * q), right = _mm512_loadu_si512(b1 + 64 * q);
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) {
        int32_t four;
        std::memcpy(&four, a + 64 * r + 4 * q, 4);
        const __m512i values = _mm512_set1_epi32(four);
        sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], left, values);
        sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], right, values);
      }
    }
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) {
    _mm512_storeu_si512(out0 + 16 * r, sums[r][0]);
    _mm512_storeu_si512(out1 + 16 * r, sums[r][1]);
  }
}

// Products of int8 panels; `row_sums` are those of a's rows.
CNMIX_VNNI inline void multiply_vnni(const Panels& p, const int32_t* row_sums, TileSums& sums) {
  for (int i = 0; i < 2 && p.a[i]; ++i) {
    for (int half = 0; half < 2; ++half)
      multiply_half_vnni(p.a[i] + 512 * half, p.b[0], p.b[1] ? p.b[1] : p.b[0], p.tiles, sums[i][0][8 * half],
                         sums[i][1][8 * half]);
    for (int j = 0; j < 2; ++j)
      for (int r = 0; r < kTileRows; ++r)
        for (int c = 0; c < kTileRows; ++c) sums[i][j][r][c] -= 128 * row_sums[i * kTileRows + r];
  }
}

// Sums of the rows of int8 panels, arranged as rows.
CNMIX_VNNI inline void sum_rows_vnni(const uint8_t* panel, int64_t panels, int64_t tiles, int32_t* out) {
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t p = 0; p < panels; ++p, panel += tiles * kTileBytes)
    for (int64_t r = 0; r < kTileRows; ++r) {
      __m512i sum = _mm512_setzero_si512();
      for (int64_t t = 0; t < tiles; ++t)
        sum = _mm512_dpbusd_epi32(sum, ones, _mm512_loadu_si512(panel + t * kTileBytes + 64 * r));
      out[p * kTileRows + r] = _mm512_reduce_add_epi32(sum);
    }
}

}  // namespace cnmix

#endif
