// int16 products from int8 ones. An int16 value is 256 * high + low + 128 with both digits in int8; the offset, which keeps
// 32640..32767 representable, is made up for with row and column sums:
//   sum a*b = sum (256 ah + al)(256 bh + bl) + 128 * (sum a + sum b) - 128 * 128 * K        for two int16 operands
//   sum a*b = sum (256 ah + al) b + 128 * sum b                                             for int16 a and int8 b

#include "common.h"

namespace cnmix {
namespace {

template <typename T>
void sum_rows(const T* x, int64_t rows, int64_t columns, int64_t* out) {
  parallel_for(rows, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, columns)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      int64_t total = 0;
      const T* line = x + r * columns;
      for (int64_t c = 0; c < columns; c += 32768) {  // 2**15 values of 2**15 stay in int32
        int32_t part = 0;
        const int64_t last = std::min(columns, c + 32768);
        for (int64_t i = c; i < last; ++i) part += line[i];
        total += part;
      }
      out[r] = total;
    }
  });
}

template <typename T>
void sum_columns(const T* x, int64_t rows, int64_t columns, int64_t* out) {
  parallel_for(columns, std::max<int64_t>(16, 65536 / std::max<int64_t>(1, rows)), [&](int64_t begin, int64_t end) {
    std::fill(out + begin, out + end, int64_t{0});
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = begin; c < end; ++c) out[c] += x[r * columns + c];
  });
}

CNMIX_INLINE void split_digits_body(const int16_t* x, int8_t* high, int8_t* low, int64_t n) {
  CNMIX_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    high[i] = static_cast<int8_t>(x[i] >> 8);
    low[i] = static_cast<int8_t>((x[i] & 255) - 128);
  }
}
CNMIX_DISPATCH(split_digits, (const int16_t* x, int8_t* high, int8_t* low, int64_t n), (x, high, low, n))

// sums = base + 2**16 p16 + 2**8 (p8a + p8b) + p0 + 128 column
CNMIX_INLINE void add_digits_body(int64_t* sums, int64_t n, int64_t base, const int32_t* p16, const int32_t* p8a,
                                  const int32_t* p8b, const int32_t* p0, const int64_t* column) {
  CNMIX_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) sums[i] = base + p0[i] + static_cast<int64_t>(p8a[i]) * 256;
  if (p16) {
    CNMIX_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) sums[i] += static_cast<int64_t>(p16[i]) * 65536 + static_cast<int64_t>(p8b[i]) * 256;
  }
  if (column) {
    CNMIX_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) sums[i] += 128 * column[i];
  }
}
CNMIX_DISPATCH(add_digits,
               (int64_t* sums, int64_t n, int64_t base, const int32_t* p16, const int32_t* p8a, const int32_t* p8b,
                const int32_t* p0, const int64_t* column),
               (sums, n, base, p16, p8a, p8b, p0, column))

CNMIX_INLINE void round_sums_body(const int64_t* sums, float* out, int64_t n, float scale, const float* bias) {
  scale_sums(sums, out, n, scale, bias);
}
CNMIX_DISPATCH(round_sums, (const int64_t* sums, float* out, int64_t n, float scale, const float* bias),
               (sums, out, n, scale, bias))

}  // namespace
}  // namespace cnmix

using namespace cnmix;

CNMIX_API void cnmix_split(const int16_t* x, int8_t* high, int8_t* low, int64_t n) {
  parallel_for(n, 65536, [&](int64_t begin, int64_t end) {
    split_digits(x + begin, high + begin, low + begin, end - begin);
  });
}

// Sums of the rows (by_row) or columns of an int8 or int16 matrix.
CNMIX_API void cnmix_sums(const void* x, int64_t rows, int64_t columns, int itemsize, int by_row, int64_t* out) {
  if (itemsize == 1 && by_row) sum_rows(static_cast<const int8_t*>(x), rows, columns, out);
  if (itemsize == 1 && !by_row) sum_columns(static_cast<const int8_t*>(x), rows, columns, out);
  if (itemsize == 2 && by_row) sum_rows(static_cast<const int16_t*>(x), rows, columns, out);
  if (itemsize == 2 && !by_row) sum_columns(static_cast<const int16_t*>(x), rows, columns, out);
}

// The integer (p16 << 16) + ((p8a + p8b) << 8) + p0 + 128 * (row + column) + constant of each element; p16 and p8b may be null
// together, and so may row and column each.
// Rounds it once into floats times a power of two (+ bias per column), or adds it to int64 totals.
struct CnmixCombine {
  int64_t rows, columns;
  const int32_t *p16, *p8a, *p8b, *p0;
  const int64_t *row, *column;
  int64_t constant;
  float scale;
  const float* bias;
  float* out;
  int64_t* total;
};

CNMIX_API void cnmix_combine(const CnmixCombine* job) {
  const CnmixCombine w = *job;
  parallel_for(w.rows, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, w.columns)), [&](int64_t begin, int64_t end) {
    constexpr int64_t kPiece = 512;
    int64_t sums[kPiece];
    for (int64_t r = begin; r < end; ++r) {
      const int64_t base = w.constant + (w.row ? 128 * w.row[r] : 0);
      for (int64_t first = 0; first < w.columns; first += kPiece) {
        const int64_t n = std::min(kPiece, w.columns - first), at = r * w.columns + first;
        add_digits(sums, n, base, w.p16 ? w.p16 + at : nullptr, w.p8a + at, w.p8b ? w.p8b + at : nullptr, w.p0 + at,
                   w.column ? w.column + first : nullptr);
        if (w.total)
          for (int64_t i = 0; i < n; ++i) w.total[at + i] += sums[i];
        else
          round_sums(sums, w.out + at, n, w.scale, w.bias ? w.bias + first : nullptr);
      }
    }
  });
}
