// Floats to integers in every rounding, as kernels/reference.py defines them, a block at a time.
#pragma once

#include <cmath>

#include "avx512.h"

namespace cnmix {
namespace {

enum Rounding { NEAREST_EVEN = 0, HALF_UP = 1, HALF_AWAY = 2, STOCHASTIC = 3 };

struct Format {
  float scale, scale_rest;  // 2**-position in two factors: 2**128 is no float
  float low, high;          // limits as floats; high is 2**30 for 31 bits, where 2**30 - 1 is none
  int32_t last;             // largest integer
  Rounding rounding;
  uint64_t seed, stream;
};

Format make_format(int bits, int position, int rounding, uint64_t seed, uint64_t stream) {
  Format f;
  const int half = -position / 2;
  const bool one = position >= -127 && position <= 126;
  f.scale = std::ldexp(1.0f, one ? -position : half);
  f.scale_rest = one ? 1.0f : std::ldexp(1.0f, -position - half);
  f.low = -std::ldexp(1.0f, bits - 1);
  f.last = static_cast<int32_t>((int64_t{1} << (bits - 1)) - 1);
  f.high = bits == 31 ? std::ldexp(1.0f, 30) : static_cast<float>(f.last);
  f.rounding = static_cast<Rounding>(rounding);
  f.seed = seed;
  f.stream = stream;
  return f;
}

inline uint32_t magnitude_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u & 0x7fffffffu;  // ordered as the magnitudes are, NaN above infinity
}

inline float from_bits(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

// Philox4x32-10 (Salmon et al., SC 2011) of `lanes` consecutive counters: four words each, in `out`.
template <int lanes>
CNMIX_INLINE void philox(uint64_t block, uint64_t stream, uint64_t seed, uint32_t* out) {
  uint32_t c0[lanes], c1[lanes], c2[lanes], c3[lanes];
  for (int j = 0; j < lanes; ++j) {
    const uint64_t counter = block + static_cast<uint64_t>(j);
    c0[j] = static_cast<uint32_t>(counter);
    c1[j] = static_cast<uint32_t>(counter >> 32);
    c2[j] = static_cast<uint32_t>(stream);
    c3[j] = static_cast<uint32_t>(stream >> 32);
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int j = 0; j < lanes; ++j) {
      const uint64_t p0 = uint64_t{0xD2511F53u} * c0[j], p1 = uint64_t{0xCD9E8D57u} * c2[j];
      c0[j] = static_cast<uint32_t>(p1 >> 32) ^ c1[j] ^ k0;
      c2[j] = static_cast<uint32_t>(p0 >> 32) ^ c3[j] ^ k1;
      c1[j] = static_cast<uint32_t>(p1);
      c3[j] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int j = 0; j < lanes; ++j) {
    out[4 * j] = c0[j];
    out[4 * j + 1] = c1[j];
    out[4 * j + 2] = c2[j];
    out[4 * j + 3] = c3[j];
  }
}

// The integer of one value, clamped first: limits are integers, so rounding does not leave them.
inline int32_t round_one(float x, const Format& f, uint32_t word) {
  float v = x * f.scale * f.scale_rest;
  if (v != v) return 0;  // the caller sees the NaN in the largest magnitude, and uses no result
  v = v < f.low ? f.low : (v > f.high ? f.high : v);
  double r;
  switch (f.rounding) {
    case NEAREST_EVEN:
      r = std::nearbyint(static_cast<double>(v));
      break;
    case HALF_UP:
      r = std::floor(static_cast<double>(v) + 0.5);
      break;
    case HALF_AWAY:
      r = std::copysign(std::floor(std::fabs(static_cast<double>(v)) + 0.5), v);
      break;
    default:
      // From the unclamped product in double: below float's range the reference still sees the sign.
      r = std::floor(static_cast<double>(x) * f.scale * f.scale_rest + (word >> 8) * 0x1p-24);
      r = r < f.low ? f.low : r;
  }
  return r > f.last ? f.last : static_cast<int32_t>(r);
}

// Sixty-four values at once, stochastically: sixteen counters side by side, from `block` on.
constexpr int kCounters = 16;
CNMIX_INLINE void stochastic_values_body(const float* x, int32_t* out, uint64_t block, const Format& f) {
  uint32_t words[4 * kCounters];
  philox<kCounters>(block, f.stream, f.seed, words);
  const double scale = static_cast<double>(f.scale) * f.scale_rest, low = f.low, last = f.last;
  for (int64_t i = 0; i < 4 * kCounters; ++i) {
    double r = std::floor(x[i] * scale + static_cast<int32_t>(words[i] >> 8) * 0x1p-24);
    r = r < low ? low : r;
    r = r > last ? last : r;
    out[i] = r == r ? static_cast<int32_t>(r) : 0;
  }
}
CNMIX_DISPATCH(stochastic_values, (const float* x, int32_t* out, uint64_t block, const Format& f), (x, out, block, f))

template <typename Out>
void round_block(const float* x, Out* out, int64_t n, int64_t index, const Format& f) {
  uint32_t words[4] = {0, 0, 0, 0};
  for (int64_t i = 0; i < n; ++i) {
    if (f.rounding == STOCHASTIC && (index + i) % 4 == 0) {
      int32_t values[4 * kCounters];
      for (; i + 4 * kCounters <= n; i += 4 * kCounters) {
        stochastic_values(x + i, values, static_cast<uint64_t>(index + i) / 4, f);
        for (int64_t j = 0; j < 4 * kCounters; ++j) out[i + j] = static_cast<Out>(values[j]);
      }
      if (i == n) break;
    }
    if (f.rounding == STOCHASTIC && (i == 0 || (index + i) % 4 == 0))
      philox<1>(static_cast<uint64_t>(index + i) / 4, f.stream, f.seed, words);
    out[i] = static_cast<Out>(round_one(x[i], f, words[(index + i) % 4]));
  }
}

uint32_t absmax_block(const float* x, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) most = std::max(most, magnitude_bits(x[i]));
  return most;
}

#if defined(CNMIX_X86)

CNMIX_AVX512 uint32_t absmax_block_avx512(const float* x, int64_t n) {
  const __m512i mask = _mm512_set1_epi32(0x7fffffff);
  __m512i most = _mm512_setzero_si512(), more = most;
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    most = _mm512_max_epi32(most, _mm512_and_epi32(_mm512_loadu_si512(x + i), mask));
    more = _mm512_max_epi32(more, _mm512_and_epi32(_mm512_loadu_si512(x + i + 16), mask));
  }
  const uint32_t all = static_cast<uint32_t>(_mm512_reduce_max_epi32(_mm512_max_epi32(most, more)));
  return std::max(all, absmax_block(x + i, n - i));
}

CNMIX_AVX2 uint32_t absmax_block_avx2(const float* x, int64_t n) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  __m256i most = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    most = _mm256_max_epi32(most, _mm256_and_si256(v, mask));
  }
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), most);
  uint32_t all = 0;
  for (int32_t lane : lanes) all = std::max(all, static_cast<uint32_t>(lane));
  return std::max(all, absmax_block(x + i, n - i));
}

CNMIX_AVX512 inline __m512i round16(const float* x, __m512 scale, __m512 rest, __m512 low, __m512 high, __m512i mask,
                                    __m512i& most) {
  const __m512 v = _mm512_loadu_ps(x);
  most = _mm512_max_epi32(most, _mm512_and_epi32(_mm512_castps_si512(v), mask));
  const __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(v, scale), rest);
  return _mm512_cvt_roundps_epi32(_mm512_min_ps(_mm512_max_ps(scaled, low), high),
                                  _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

CNMIX_AVX512 inline void store16(int8_t* out, __m512i q, __m512i) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtsepi32_epi8(q));
}
CNMIX_AVX512 inline void store16(int16_t* out, __m512i q, __m512i) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtsepi32_epi16(q));
}
CNMIX_AVX512 inline void store16(int32_t* out, __m512i q, __m512i last) {
  _mm512_storeu_si512(out, _mm512_min_epi32(q, last));
}

// To nearest even; returns the largest magnitude's bits.
template <typename Out>
CNMIX_AVX512 uint32_t nearest_block_avx512(const float* x, Out* out, int64_t n, const Format& f) {
  const __m512 scale = _mm512_set1_ps(f.scale), rest = _mm512_set1_ps(f.scale_rest);
  const __m512 low = _mm512_set1_ps(f.low), high = _mm512_set1_ps(f.high);
  const __m512i mask = _mm512_set1_epi32(0x7fffffff), last = _mm512_set1_epi32(f.last);
  __m512i most = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 64 <= n; i += 64)
    for (int64_t j = i; j < i + 64; j += 16) store16(out + j, round16(x + j, scale, rest, low, high, mask, most), last);
  for (; i + 16 <= n; i += 16) store16(out + i, round16(x + i, scale, rest, low, high, mask, most), last);
  round_block(x + i, out + i, n - i, 0, f);
  return std::max(static_cast<uint32_t>(_mm512_reduce_max_epi32(most)), absmax_block(x + i, n - i));
}

// Sixteen counters of Philox at once: word j of counter i in lane i of words[j].
CNMIX_AVX512 inline void philox16(uint64_t block, uint64_t stream, uint64_t seed, __m512i* words) {
  const __m512i low = _mm512_set1_epi32(static_cast<int>(block));
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i c0 = _mm512_add_epi32(low, lanes), c1 = _mm512_set1_epi32(static_cast<int>(block >> 32));
  c1 = _mm512_mask_add_epi32(c1, _mm512_cmplt_epu32_mask(c0, low), c1, _mm512_set1_epi32(1));
  __m512i c2 = _mm512_set1_epi32(static_cast<int>(stream)), c3 = _mm512_set1_epi32(static_cast<int>(stream >> 32));
  const __m512i m0 = _mm512_set1_epi32(static_cast<int>(0xD2511F53u)), m1 = _mm512_set1_epi32(static_cast<int>(0xCD9E8D57u));
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  const __mmask16 odd = 0xaaaa;
  for (int round = 0; round < 10; ++round) {
    const __m512i even0 = _mm512_mul_epu32(c0, m0), odd0 = _mm512_mul_epu32(_mm512_srli_epi64(c0, 32), m0);
    const __m512i even1 = _mm512_mul_epu32(c2, m1), odd1 = _mm512_mul_epu32(_mm512_srli_epi64(c2, 32), m1);
    const __m512i high0 = _mm512_mask_mov_epi32(_mm512_srli_epi64(even0, 32), odd, odd0);
    const __m512i high1 = _mm512_mask_mov_epi32(_mm512_srli_epi64(even1, 32), odd, odd1);
    c0 = _mm512_xor_si512(_mm512_xor_si512(high1, c1), _mm512_set1_epi32(static_cast<int>(k0)));
    c2 = _mm512_xor_si512(_mm512_xor_si512(high0, c3), _mm512_set1_epi32(static_cast<int>(k1)));
    c1 = _mm512_mask_mov_epi32(even1, odd, _mm512_slli_epi64(odd1, 32));
    c3 = _mm512_mask_mov_epi32(even0, odd, _mm512_slli_epi64(odd0, 32));
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

CNMIX_AVX512 inline __m256i stochastic8(__m256 x, __m256i word, __m512d scale, __m512d low, __m512d last) {
  const __m512d uniform = _mm512_mul_pd(_mm512_cvtepi32_pd(_mm256_srli_epi32(word, 8)), _mm512_set1_pd(0x1p-24));
  const __m512d moved = _mm512_add_pd(_mm512_mul_pd(_mm512_cvtps_pd(x), scale), uniform);
  const __m512d whole = _mm512_roundscale_pd(moved, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const __mmask8 number = _mm512_cmp_pd_mask(moved, moved, _CMP_ORD_Q);
  return _mm512_maskz_cvtpd_epi32(number, _mm512_min_pd(_mm512_max_pd(whole, low), last));
}

// Whole groups of sixty-four values, from a multiple of four on; returns how many values that were.
template <typename Out>
CNMIX_AVX512 int64_t stochastic_groups_avx512(const float* x, Out* out, int64_t n, int64_t index, const Format& f) {
  const __m512d scale = _mm512_set1_pd(static_cast<double>(f.scale) * f.scale_rest);
  const __m512d low = _mm512_set1_pd(f.low), last = _mm512_set1_pd(f.last);
  const __m512i most = _mm512_set1_epi32(f.last);
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    __m512i w[4];
    philox16(static_cast<uint64_t>(index + i) / 4, f.stream, f.seed, w);
    // From words of sixteen counters to counters of four words, then the counters into order.
    const __m512i a = _mm512_unpacklo_epi32(w[0], w[1]), b = _mm512_unpackhi_epi32(w[0], w[1]);
    const __m512i c = _mm512_unpacklo_epi32(w[2], w[3]), d = _mm512_unpackhi_epi32(w[2], w[3]);
    w[0] = _mm512_unpacklo_epi64(a, c);
    w[1] = _mm512_unpackhi_epi64(a, c);
    w[2] = _mm512_unpacklo_epi64(b, d);
    w[3] = _mm512_unpackhi_epi64(b, d);
    transpose_lanes(w);
    for (int g = 0; g < 4; ++g) {
      const __m512 values = _mm512_loadu_ps(x + i + 16 * g);
      const __m256i first = stochastic8(_mm512_castps512_ps256(values), _mm512_castsi512_si256(w[g]), scale, low, last);
      const __m256i second = stochastic8(_mm512_extractf32x8_ps(values, 1), _mm512_extracti64x4_epi64(w[g], 1), scale, low,
                                         last);
      store16(out + i + 16 * g, _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1), most);
    }
  }
  return i;
}

CNMIX_AVX2 inline __m256i round8(const float* x, const Format& f, __m256i& most) {
  const __m256 v = _mm256_loadu_ps(x);
  most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff)));
  const __m256 scaled = _mm256_mul_ps(_mm256_mul_ps(v, _mm256_set1_ps(f.scale)), _mm256_set1_ps(f.scale_rest));
  const __m256 inside = _mm256_min_ps(_mm256_max_ps(scaled, _mm256_set1_ps(f.low)), _mm256_set1_ps(f.high));
  const __m256 rounded = _mm256_round_ps(inside, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm256_min_epi32(_mm256_cvtps_epi32(rounded), _mm256_set1_epi32(f.last));
}

template <typename Out>
CNMIX_AVX2 uint32_t nearest_block_avx2(const float* x, Out* out, int64_t n, const Format& f) {
  __m256i most = _mm256_setzero_si256();
  alignas(32) int32_t lanes[8];
  int64_t i = 0;
  if (sizeof(Out) == 1) {
    // Packing works within 128-bit halves; the permutation puts the groups of four back in order.
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (; i + 32 <= n; i += 32) {
      const __m256i a = round8(x + i, f, most), b = round8(x + i + 8, f, most);
      const __m256i c = round8(x + i + 16, f, most), d = round8(x + i + 24, f, most);
      const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_permutevar8x32_epi32(packed, order));
    }
  } else if (sizeof(Out) == 2) {
    for (; i + 16 <= n; i += 16) {
      const __m256i a = round8(x + i, f, most), b = round8(x + i + 8, f, most);
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), packed);
    }
  } else {
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), round8(x + i, f, most));
  }
  round_block(x + i, out + i, n - i, 0, f);
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), most);
  uint32_t all = absmax_block(x + i, n - i);
  for (int32_t lane : lanes) all = std::max(all, static_cast<uint32_t>(lane));
  return all;
}

#endif

}  // namespace
}  // namespace cnmix
