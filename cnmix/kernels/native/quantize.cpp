// Quantize float32 to int8, int16 or 31 bits in int32, as kernels/reference.py defines it, with the statistics that the
// adaptive algorithm asks for. Work goes in blocks of fixed length, each done by one thread, and the sums of the blocks
// are added in order: results do not depend on the number of threads.

#include <cmath>
#include <limits>
#include <vector>

#include "common.h"

namespace cnmix {

namespace {

enum Rounding { NEAREST_EVEN = 0, HALF_UP = 1, HALF_AWAY = 2, STOCHASTIC = 3 };

constexpr int64_t kBlock = 4096;  // elements
constexpr int64_t kGrain = 8;     // blocks that are worth a thread

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

uint32_t absmax_any(const float* x, int64_t n) {
#if defined(CNMIX_X86)
  if (active_isa >= AVX512) return absmax_block_avx512(x, n);
  if (active_isa == AVX2) return absmax_block_avx2(x, n);
#endif
  return absmax_block(x, n);
}

template <typename Out>
uint32_t quantize_any(const float* x, Out* out, int64_t n, int64_t index, const Format& f) {
#if defined(CNMIX_X86)
  if (f.rounding == NEAREST_EVEN && active_isa >= AVX512) return nearest_block_avx512(x, out, n, f);
  if (f.rounding == NEAREST_EVEN && active_isa == AVX2) return nearest_block_avx2(x, out, n, f);
#endif
  round_block(x, out, n, index, f);
  return absmax_any(x, n);
}

// Sums in eight lanes that are added in a fixed order, whatever vectors the compiler makes of them.
double sum_of_magnitudes(const float* x, int64_t n) {
  double lanes[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; ++j) lanes[j] += std::fabs(static_cast<double>(x[i + j]));
  for (int j = 0; i < n; ++i, ++j) lanes[j] += std::fabs(static_cast<double>(x[i]));
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

template <typename Out>
int64_t sum_of_integers(const Out* q, int64_t n) {
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += q[i] < 0 ? -static_cast<int64_t>(q[i]) : q[i];
  return total;
}

template <typename Out>
uint32_t quantize_all(const float* x, Out* out, int64_t n, int64_t start, const Format& f, bool measure,
                      double* sum_x, int64_t* sum_q) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  std::vector<uint32_t> most(static_cast<size_t>(blocks));
  std::vector<double> sums_x(measure ? static_cast<size_t>(blocks) : 0);
  std::vector<int64_t> sums_q(measure ? static_cast<size_t>(blocks) : 0);
  parallel_for(blocks, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t at = b * kBlock, length = std::min(kBlock, n - at);
      most[static_cast<size_t>(b)] = quantize_any(x + at, out + at, length, start + at, f);
      if (measure) {
        sums_x[static_cast<size_t>(b)] = sum_of_magnitudes(x + at, length);
        sums_q[static_cast<size_t>(b)] = sum_of_integers(out + at, length);
      }
    }
  });
  *sum_x = 0;
  *sum_q = 0;
  for (double each : sums_x) *sum_x += each;
  for (int64_t each : sums_q) *sum_q += each;
  uint32_t all = 0;
  for (uint32_t each : most) all = std::max(all, each);
  return all;
}

uint32_t absmax_all(const float* x, int64_t n) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  std::vector<uint32_t> most(static_cast<size_t>(blocks));
  parallel_for(blocks, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      most[static_cast<size_t>(b)] = absmax_any(x + b * kBlock, std::min(kBlock, n - b * kBlock));
  });
  uint32_t all = 0;
  for (uint32_t each : most) all = std::max(all, each);
  return all;
}

CNMIX_INLINE void checksum_block_body(const uint32_t* bits, int64_t n, int64_t first, uint64_t* sum) {
  uint64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += bits[i] * static_cast<uint64_t>(2 * (first + i) + 1);
  *sum = total;
}
CNMIX_DISPATCH(checksum_block, (const uint32_t* bits, int64_t n, int64_t first, uint64_t* sum), (bits, n, first, sum))

}  // namespace
}  // namespace cnmix

using namespace cnmix;

struct CnmixStatistics {
  double absmax;      // NaN where x holds one
  double sum_x;       // of |x|, where measured
  int64_t sum_q;      // of |q|, where measured
  int32_t position;   // the one used
};

// Quantizes n floats into `out`, of the width's integer type. With `choose`, the position is the one that fits the largest
// magnitude; the output is undefined where that is not finite.
CNMIX_API void cnmix_quantize(const float* x, void* out, int64_t n, int bits, int choose, int position, int rounding,
                              uint64_t seed, uint64_t stream, int64_t start, int measure, CnmixStatistics* statistics) {
  if (choose) {
    const float largest = from_bits(absmax_all(x, n));
    int exponent = 0;
    position = 0;
    if (largest > 0 && std::isfinite(largest)) {
      std::frexp(largest, &exponent);
      position = std::min(std::max(exponent - 1 - (bits - 2), -128), 127);
    }
  }
  const Format f = make_format(bits, position, rounding, seed, stream);
  uint32_t most;
  double* sum_x = &statistics->sum_x;
  int64_t* sum_q = &statistics->sum_q;
  if (bits == 8)
    most = quantize_all(x, static_cast<int8_t*>(out), n, start, f, measure != 0, sum_x, sum_q);
  else if (bits == 16)
    most = quantize_all(x, static_cast<int16_t*>(out), n, start, f, measure != 0, sum_x, sum_q);
  else
    most = quantize_all(x, static_cast<int32_t*>(out), n, start, f, measure != 0, sum_x, sum_q);
  statistics->absmax = from_bits(most);
  statistics->position = position;
}

// A sum of the bits that any single change, and any change of order, alters: bits[i] * (2 i + 1) modulo 2**64.
CNMIX_API uint64_t cnmix_checksum(const uint32_t* bits, int64_t n) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  std::vector<uint64_t> sums(static_cast<size_t>(blocks));
  parallel_for(blocks, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      checksum_block(bits + b * kBlock, std::min(kBlock, n - b * kBlock), b * kBlock, &sums[static_cast<size_t>(b)]);
  });
  uint64_t total = 0;
  for (uint64_t each : sums) total += each;
  return total;
}
