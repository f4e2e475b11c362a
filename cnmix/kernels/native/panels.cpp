#include "panels.h"

#include <vector>

#include "avx512.h"

#if defined(CNMIX_X86)

namespace cnmix {
namespace {

// Lines of an operand; gathered ones lie in memory of this thread until the next `slot` of the same number.
class Lines {
 public:
  Lines(const CnmixOperand& operand, int64_t slots) : operand_(operand) {
    if (!operand.windows) return;
    const CnmixWindows& w = *operand.windows;
    length_ = w.kernel[0] * w.kernel[1] * w.kernel[2] * w.run;
    static thread_local std::vector<uint8_t> memory;
    if (memory.size() < static_cast<size_t>(slots * length_)) memory.resize(static_cast<size_t>(slots * length_));
    gathered_ = memory.data();
  }

  const uint8_t* get(int64_t index, int64_t slot) {
    const uint8_t* data = static_cast<const uint8_t*>(operand_.data);
    if (operand_.windows) {
      uint8_t* to = gathered_ + slot * length_;
      place_.move_to(*operand_.windows, index);
      gather_window(data, *operand_.windows, place_, to);
      return to;
    }
    const int64_t at = operand_.inner ? index % operand_.inner * operand_.stride + index / operand_.inner * operand_.outer
                                      : index * operand_.stride;
    return data + at * operand_.digits;
  }

 private:
  const CnmixOperand& operand_;
  WindowPlace place_;
  int64_t length_ = 0;
  uint8_t* gathered_ = nullptr;
};

// One digit of `count` values, at most 64; zeros behind them.
CNMIX_AVX512 void extract_digit(const uint8_t* values, int64_t digits, int64_t digit, int64_t count, uint8_t* out) {
  if (digits == 1) {
    const __mmask64 mask = count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
    _mm512_storeu_si512(out, _mm512_maskz_loadu_epi8(mask, values));
    return;
  }
  if (count <= 0) {
    _mm512_storeu_si512(out, _mm512_setzero_si512());
    return;
  }
  const __m128i shift = _mm_cvtsi64_si128(8 * digit);
  if (digits == 2) {
    for (int64_t i = 0; i < 64; i += 32) {
      const int64_t left = std::max<int64_t>(0, count - i);
      const __mmask32 mask = left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
      const __m512i wide = _mm512_maskz_loadu_epi16(mask, values + 2 * i);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm512_cvtepi16_epi8(_mm512_srl_epi16(wide, shift)));
    }
    return;
  }
  for (int64_t i = 0; i < 64; i += 16) {
    const int64_t left = std::max<int64_t>(0, count - i);
    const __mmask16 mask = left >= 16 ? __mmask16(0xffff) : static_cast<__mmask16>((1u << left) - 1);
    const __m512i wide = _mm512_maskz_loadu_epi32(mask, values + 4 * i);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm512_cvtepi32_epi8(_mm512_srl_epi32(wide, shift)));
  }
}

// Four lines of 64 bytes to four tiles' lines of quads, `panel` bytes apart.
CNMIX_AVX512 inline void interleave(const uint8_t* const* lines, uint8_t* out, int64_t panel, int64_t panels) {
  const __m512i l0 = _mm512_loadu_si512(lines[0]), l1 = _mm512_loadu_si512(lines[1]);
  const __m512i l2 = _mm512_loadu_si512(lines[2]), l3 = _mm512_loadu_si512(lines[3]);
  const __m512i a = _mm512_unpacklo_epi8(l0, l1), b = _mm512_unpackhi_epi8(l0, l1);
  const __m512i c = _mm512_unpacklo_epi8(l2, l3), d = _mm512_unpackhi_epi8(l2, l3);
  // Each 128-bit lane has the quads of four rows of one panel.
  __m512i quads[4] = {_mm512_unpacklo_epi16(a, c), _mm512_unpackhi_epi16(a, c), _mm512_unpacklo_epi16(b, d),
                      _mm512_unpackhi_epi16(b, d)};
  transpose_lanes(quads);
  for (int64_t i = 0; i < panels; ++i) _mm512_storeu_si512(out + i * panel, quads[i]);
}

CNMIX_AVX512 void transpose_tile(uint8_t* tile) {
  __m512i rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(tile + 64 * i);
  transpose_registers(rows);
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(tile + 64 * i, rows[i]);
}

CNMIX_AVX512 void flip_bytes(uint8_t* out, int64_t bytes, uint8_t flip) {
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(flip));
  for (int64_t i = 0; i < bytes; i += 64)
    _mm512_storeu_si512(out + i, _mm512_xor_si512(_mm512_loadu_si512(out + i), mask));
}

// Lines that are rows: sixteen of them, tile by tile.
CNMIX_AVX512 void pack_rows(const Packing& job, int64_t first, int64_t last, uint8_t* out) {
  Lines lines(*job.operand, kTileRows);
  const int64_t tiles = job.tiles(), digits = job.operand->digits, panel = job.panel_bytes();
  const uint8_t* from[kTileRows];
  for (int64_t p = first; p < last; ++p, out += panel) {
    for (int64_t r = 0; r < kTileRows; ++r) {
      const int64_t row = p * kTileRows + r;
      from[r] = row < job.rows ? lines.get(row, r) + job.k_first * digits : nullptr;
    }
    uint8_t* to = out;
    for (int64_t d = 0; d < digits; ++d)
      for (int64_t t = 0; t < tiles; ++t, to += kTileBytes) {
        const int64_t at = t * kTileDepth, depth = job.k_count - at;
        for (int64_t r = 0; r < kTileRows; ++r)
          extract_digit(from[r] ? from[r] + at * digits : nullptr, digits, d, from[r] ? depth : 0, to + r * kTileDepth);
        if (job.arrangement == QUADS) transpose_tile(to);
      }
    if (job.flip) flip_bytes(out, panel, job.flip);
  }
}

// Lines along the rows: tiles [tile_first, tile_last) of quads, four lines at a time.
CNMIX_AVX512 void pack_quads(const Packing& job, int64_t first, int64_t last, int64_t tile_first, int64_t tile_last,
                             uint8_t* out) {
  Lines lines(*job.operand, kTileDepth);
  const int64_t tiles = job.tiles(), digits = job.operand->digits, panel = job.panel_bytes();
  const uint8_t* from[kTileDepth];
  alignas(64) uint8_t extracted[4][64];
  for (int64_t t = tile_first; t < tile_last; ++t) {
    const int64_t depth = std::min(kTileDepth, job.k_count - t * kTileDepth);
    for (int64_t i = 0; i < depth; ++i) from[i] = lines.get(job.k_first + t * kTileDepth + i, i);
    for (int64_t p = first; p < last; p += 4) {
      const int64_t row = p * kTileRows, width = std::min<int64_t>(64, job.rows - row);
      const int64_t panels = std::min<int64_t>(4, last - p);
      uint8_t* tile = out + (p - first) * panel + t * kTileBytes;
      if (!job.operand->windows && job.k_count - t * kTileDepth >= 2 * kTileDepth)
        for (int64_t i = 0; i < kTileDepth; ++i)  // the next tile's: the lines lie too far apart for the processor to guess
          _mm_prefetch(reinterpret_cast<const char*>(lines.get(job.k_first + (t + 1) * kTileDepth + i, i)) + row * digits,
                       _MM_HINT_T0);
      for (int64_t d = 0; d < digits; ++d, tile += tiles * kTileBytes) {
        for (int64_t q = 0; q < kTileRows; ++q) {
          const uint8_t* four[4];
          for (int64_t i = 0; i < 4; ++i) {
            const int64_t k = 4 * q + i;
            if (digits == 1 && width == 64 && k < depth) {
              four[i] = from[k] + row;
              continue;
            }
            extract_digit(k < depth ? from[k] + row * digits : nullptr, digits, d, k < depth ? width : 0, extracted[i]);
            four[i] = extracted[i];
          }
          interleave(four, tile + q * 64, panel, panels);
        }
        for (int64_t i = 0; i < panels; ++i) {
          uint8_t* one = tile + i * panel;
          if (job.arrangement == ROWS) transpose_tile(one);
          if (job.flip) flip_bytes(one, kTileBytes, job.flip);
        }
      }
    }
  }
}

}  // namespace

void pack_panels(const Packing& job, int64_t first, int64_t last, uint8_t* out) {
  if (job.operand->by_k)
    pack_quads(job, first, last, 0, job.tiles(), out);
  else
    pack_rows(job, first, last, out);
}

void pack_all(const Packing& job, int64_t first, int64_t last, uint8_t* out) {
  const int64_t tiles = job.tiles();
  constexpr int64_t kGrainBytes = 32768;
  if (job.operand->by_k)
    parallel_for(tiles, std::max<int64_t>(1, kGrainBytes / ((last - first) * kTileBytes)),
                 [&](int64_t begin, int64_t end) { pack_quads(job, first, last, begin, end, out); });
  else
    parallel_for(last - first, std::max<int64_t>(1, kGrainBytes / job.panel_bytes()), [&](int64_t begin, int64_t end) {
      pack_rows(job, first + begin, first + end, out + begin * job.panel_bytes());
    });
}

}  // namespace cnmix

#endif
