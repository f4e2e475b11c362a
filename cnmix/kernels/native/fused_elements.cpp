// The steps of a plan that multiply nothing: float elements, pools, copies into wider rows and enlarged images.

#include <cmath>
#include <limits>

#include "chain.h"

namespace cnmix {

#if defined(CNMIX_X86)

namespace {

constexpr int64_t kElementsOfTask = 16384;

thread_local Scratch pixels_memory;

// Rows of floats, `stride` apart, from `row` and `channel` of the output on.
CNMIX_AVX512 void finish_floats(const Chain& chain, const float* x, int64_t stride, int64_t row, int64_t count,
                                int64_t channel, int64_t width, float* bad) {
  __m512 v[16];
  if (count >= 16 && width >= 16) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) v[i] = _mm512_loadu_ps(x + i * stride);
    return apply_chain<WHOLE>(chain, v, row, 16, channel, 0xffff, bad);
  }
  const __mmask16 lanes = first_lanes(width);
  const int64_t last = std::min<int64_t>(16, count) - 1;
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = _mm512_maskz_loadu_ps(lanes, x + std::min<int64_t>(i, last) * stride);
  apply_chain<SOME_CHANNELS>(chain, v, row, last + 1, channel, lanes, bad);
}

// Whether the elements can be taken as they follow each other, whatever their channels.
bool is_flat(const Chain& chain, int64_t channels) {
  for (int64_t i = 0; i < chain.count; ++i) {
    const Stage& s = chain.stages[i];
    if (s.kind == MULTIPLY || s.kind == ADD || s.kind == MULTIPLY_ADD || (s.memory && s.stride != channels)) return false;
  }
  return true;
}

// Elements [first, first + count) of chains that know no channels, in rows of sixteen.
void finish_flat(const Chain& given, const float* x, int64_t first, int64_t count, float* bad) {
  Chain chain = given;
  for (int64_t i = 0; i < chain.count; ++i) chain.stages[i].stride = 16;
  const int64_t rows = count / 16, rest = count % 16;
  for (int64_t r = 0; r < rows; r += 16)
    finish_floats(chain, x + 16 * r, 16, r, rows - r, first, 16, bad);
  if (rest) finish_floats(chain, x + 16 * rows, 16, rows, 1, first, rest, bad);
}

// Pixels of an image that lies channel by channel, with their channels side by side.
CNMIX_AVX512 void gather_pixels(const float* x, int64_t plane, int64_t channels, int64_t pixels, float* out) {
  int64_t p = 0;
  if (channels == 3) {  // of images: element e of three registers is channel e % 3 of pixel e / 3
    alignas(64) static const int32_t kPixels[3][16] = {{0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5},
                                                       {5, 5, 6, 6, 6, 7, 7, 7, 8, 8, 8, 9, 9, 9, 10, 10},
                                                       {10, 11, 11, 11, 12, 12, 12, 13, 13, 13, 14, 14, 14, 15, 15, 15}};
    static const __mmask16 kSecond[3] = {0x2492, 0x9249, 0x4924}, kThird[3] = {0x4924, 0x2492, 0x9249};
    for (; p + 16 <= pixels; p += 16)
      for (int64_t i = 0; i < 3; ++i) {
        const __m512i from = _mm512_load_si512(kPixels[i]);
        __m512i v = _mm512_permutexvar_epi32(from, _mm512_loadu_si512(x + p));
        v = _mm512_mask_permutexvar_epi32(v, kSecond[i], from, _mm512_loadu_si512(x + plane + p));
        v = _mm512_mask_permutexvar_epi32(v, kThird[i], from, _mm512_loadu_si512(x + 2 * plane + p));
        _mm512_storeu_si512(out + 3 * p + 16 * i, v);
      }
  }
  for (; p + 16 <= pixels; p += 16)
    for (int64_t c = 0; c < channels; c += 16) {
      const int64_t width = std::min<int64_t>(16, channels - c);
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        r[i] = i < width ? _mm512_loadu_si512(x + (c + i) * plane + p) : _mm512_setzero_si512();
      transpose_registers(r);
      float* to = out + p * channels + c;
      const __mmask16 lanes = first_lanes(width);
      for (int i = 0; i < 16; ++i) _mm512_mask_storeu_epi32(to + i * channels, lanes, r[i]);
    }
  for (; p < pixels; ++p)
    for (int64_t c = 0; c < channels; ++c) out[p * channels + c] = x[c * plane + p];
}

int64_t rows_of_task(int64_t channels) { return std::max<int64_t>(16, kElementsOfTask / channels / 16 * 16); }

// Pixels that one dimension of a pool's window meets, for the positions of one task.
struct Met {
  int64_t first, last;  // taps
};
Met met_taps(const CnmixWindows& w, int dim, int64_t position) {
  const int64_t start = position * w.stride[dim] - w.before[dim];
  Met met{0, w.kernel[dim]};
  while (met.first < met.last && start + met.first * w.dilation[dim] < 0) ++met.first;
  while (met.last > met.first && start + (met.last - 1) * w.dilation[dim] >= w.size[dim]) --met.last;
  return met;
}

struct BytesMax {
  typedef int8_t Element;
  static constexpr int64_t kLanes = 64;
  typedef __m512i Register;
  CNMIX_AVX512 static inline Register lowest() { return _mm512_set1_epi8(-128); }
  CNMIX_AVX512 static inline Register larger(Register most, const int8_t* x, int64_t n) {
    return _mm512_max_epi8(most, _mm512_mask_loadu_epi8(lowest(), lanes(n), x));
  }
  CNMIX_AVX512 static inline void store(int8_t* to, int64_t n, Register x) { _mm512_mask_storeu_epi8(to, lanes(n), x); }
  CNMIX_AVX512 static inline __mmask64 lanes(int64_t n) { return n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1; }
};

struct WordsMax {
  typedef int16_t Element;
  static constexpr int64_t kLanes = 32;
  typedef __m512i Register;
  CNMIX_AVX512 static inline Register lowest() { return _mm512_set1_epi16(-32768); }
  CNMIX_AVX512 static inline Register larger(Register most, const int16_t* x, int64_t n) {
    return _mm512_max_epi16(most, _mm512_mask_loadu_epi16(lowest(), lanes(n), x));
  }
  CNMIX_AVX512 static inline void store(int16_t* to, int64_t n, Register x) {
    _mm512_mask_storeu_epi16(to, lanes(n), x);
  }
  CNMIX_AVX512 static inline __mmask32 lanes(int64_t n) { return n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1; }
};

struct FloatsMax {
  typedef float Element;
  static constexpr int64_t kLanes = 16;
  typedef __m512 Register;
  CNMIX_AVX512 static inline Register lowest() { return _mm512_set1_ps(-std::numeric_limits<float>::infinity()); }
  // As torch: a NaN comes in, and stays.
  CNMIX_AVX512 static inline Register larger(Register most, const float* x, int64_t n) {
    const Register v = _mm512_mask_loadu_ps(lowest(), first_lanes(n), x);
    const __mmask16 taken = _mm512_cmp_ps_mask(v, most, _CMP_GT_OQ) | _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_mask_mov_ps(most, taken, v);
  }
  CNMIX_AVX512 static inline void store(float* to, int64_t n, Register x) {
    _mm512_mask_storeu_ps(to, first_lanes(n), x);
  }
};

template <typename Max>
CNMIX_AVX512 void pool_rows(const Job& job, int64_t first, int64_t last) {
  typedef typename Max::Element Element;
  const CnmixStep& step = *job.step;
  const CnmixWindows& w = step.windows;
  const int64_t channels = step.channels;
  Element* to = reinterpret_cast<Element*>(job.target) + first * channels;
  WindowPlace place;
  for (int64_t row = first; row < last; ++row, to += channels) {
    place.move_to(w, row);
    const Element* image = reinterpret_cast<const Element*>(job.source) +
                           place.image * w.size[0] * w.size[1] * w.size[2] * channels;
    Met met[3];
    int64_t start[3];
    for (int d = 0; d < 3; ++d) {
      met[d] = met_taps(w, d, place.position[d]);
      start[d] = place.position[d] * w.stride[d] - w.before[d];
    }
    for (int64_t c = 0; c < channels; c += Max::kLanes) {
      typename Max::Register most = Max::lowest();
      for (int64_t k0 = met[0].first; k0 < met[0].last; ++k0)
        for (int64_t k1 = met[1].first; k1 < met[1].last; ++k1)
          for (int64_t k2 = met[2].first; k2 < met[2].last; ++k2) {
            const int64_t at = ((start[0] + k0 * w.dilation[0]) * w.size[1] + start[1] + k1 * w.dilation[1]) * w.size[2] +
                               start[2] + k2 * w.dilation[2];
            most = Max::larger(most, image + at * channels + c, channels - c);
          }
      Max::store(to + c, channels - c, most);
    }
  }
}

int64_t copied_rows(const CnmixStep& step) { return std::max<int64_t>(1, kElementsOfTask / step.windows.run); }

}  // namespace

int64_t elements_tasks(const CnmixStep& step) {
  return step.channels == 0 ? 0 : (step.rows + rows_of_task(step.channels) - 1) / rows_of_task(step.channels);
}

void run_elements(const Job& job, int64_t task, Worker& worker) {
  const CnmixStep& step = *job.step;
  const int64_t channels = step.channels, each = rows_of_task(channels);
  const int64_t first = task * each, last = std::min(step.rows, first + each);
  const float* x = reinterpret_cast<const float*>(job.source);
  const float* from = x + first * channels;
  if (job.planes) {
    float* out = reinterpret_cast<float*>(pixels_memory.get(each * channels * 4));
    if (!out) {
      worker.failed = true;
      return;
    }
    const int64_t plane = step.rows / step.windows.images;
    for (int64_t row = first; row < last;) {
      const int64_t image = row / plane, pixel = row % plane, count = std::min(last - row, plane - pixel);
      gather_pixels(x + image * plane * channels + pixel, plane, channels, count, out + (row - first) * channels);
      row += count;
    }
    from = out;
  }
  if (is_flat(job.chain, channels))
    return finish_flat(job.chain, from, first * channels, (last - first) * channels, worker.bad);
  for (int64_t row = first; row < last; row += 16)
    for (int64_t c = 0; c < channels; c += 16)
      finish_floats(job.chain, from + (row - first) * channels + c, channels, row, last - row, c, channels - c,
                    worker.bad);
}

int64_t pool_tasks(const CnmixStep& step) { return elements_tasks(step); }

void run_pool(const Job& job, int64_t task) {
  const CnmixStep& step = *job.step;
  const int64_t each = rows_of_task(step.channels), first = task * each, last = std::min(step.rows, first + each);
  if (step.bytes == 1) return pool_rows<BytesMax>(job, first, last);
  if (step.bytes == 2) return pool_rows<WordsMax>(job, first, last);
  pool_rows<FloatsMax>(job, first, last);
}

int64_t copy_tasks(const CnmixStep& step) {
  return step.windows.run == 0 ? 0 : (step.rows + copied_rows(step) - 1) / copied_rows(step);
}

void run_copy(const Job& job, int64_t task) {
  const CnmixStep& step = *job.step;
  const int64_t each = copied_rows(step), first = task * each, last = std::min(step.rows, first + each);
  for (int64_t row = first; row < last; ++row)
    copy_run(job.target + row * step.target_stride, job.source + row * step.source_stride, step.windows.run);
}

void run_enlarge(const Job& job, int64_t task) {
  const CnmixStep& step = *job.step;
  const CnmixWindows& w = step.windows;
  const int64_t each = copied_rows(step), first = task * each, last = std::min(step.rows, first + each);
  WindowPlace place;
  for (int64_t row = first; row < last; ++row) {
    place.move_to(w, row);
    int64_t at = place.image;
    for (int d = 0; d < 3; ++d) at = at * w.size[d] + place.position[d] * w.size[d] / w.output[d];
    copy_run(job.target + row * w.run, job.source + at * w.run, w.run);
  }
}

#endif

}  // namespace cnmix
