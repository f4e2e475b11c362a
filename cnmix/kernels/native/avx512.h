// What several kernels do with AVX-512 registers.
#pragma once

#include "common.h"

#if defined(CNMIX_X86)

namespace cnmix {

CNMIX_AVX512 inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? __mmask16(0xffff) : static_cast<__mmask16>((1u << count) - 1);
}

// Transposes sixteen registers of sixteen 32-bit elements.
CNMIX_AVX512 inline void transpose_registers(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
  }
}

// Transposes four registers of four 128-bit lanes.
CNMIX_AVX512 inline void transpose_lanes(__m512i* r) {
  const __m512i even01 = _mm512_shuffle_i32x4(r[0], r[1], 0x88), odd01 = _mm512_shuffle_i32x4(r[0], r[1], 0xdd);
  const __m512i even23 = _mm512_shuffle_i32x4(r[2], r[3], 0x88), odd23 = _mm512_shuffle_i32x4(r[2], r[3], 0xdd);
  r[0] = _mm512_shuffle_i32x4(even01, even23, 0x88);
  r[1] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
  r[2] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
  r[3] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
}

}  // namespace cnmix

#endif
