// A depthwise convolution of a plan: the lanes are channels, and four taps of each are multiplied at once.

#include <vector>

#include "chain.h"

namespace cnmix {

#if defined(CNMIX_X86)

namespace {

constexpr int64_t kLanes = 64;
constexpr int64_t kPositionsOfTask = 4096;  // times channels, over 64

// Pixels that the taps of a window meet, and `zeros` outside the input and behind the last tap.
void find_pixels(const uint8_t* x, const CnmixWindows& w, const WindowPlace& place, const uint8_t* zeros,
                 int64_t quads, const uint8_t** pixels) {
  const uint8_t* image = x + place.image * w.size[0] * w.size[1] * w.size[2] * w.pixel;
  const uint8_t** const end = pixels + 4 * quads;
  for (int64_t k0 = 0; k0 < w.kernel[0]; ++k0) {
    const int64_t p0 = met_pixel(w, 0, place.position[0], k0);
    for (int64_t k1 = 0; k1 < w.kernel[1]; ++k1) {
      const int64_t p1 = p0 < 0 ? -1 : met_pixel(w, 1, place.position[1], k1);
      for (int64_t k2 = 0; k2 < w.kernel[2]; ++k2) {
        const int64_t p2 = p1 < 0 ? -1 : met_pixel(w, 2, place.position[2], k2);
        *pixels++ = p2 < 0 ? zeros : image + ((p0 * w.size[1] + p1) * w.size[2] + p2) * w.pixel;
      }
    }
  }
  while (pixels != end) *pixels++ = zeros;
}

// The sums of one position in up to 64 channels. `factors` has for each quad of taps four registers, of four taps of
// sixteen channels each, as unpacking leaves them.
CNMIX_VNNI __attribute__((always_inline)) inline void multiply_position(const uint8_t* const* pixels, int64_t quads,
                                                                        int64_t channel, __mmask64 lanes,
                                                                        const uint8_t* factors,
                                                                        const int32_t* corrections, __m512i* sums) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  for (int i = 0; i < 4; ++i) sums[i] = _mm512_loadu_si512(corrections + 16 * i);
  for (int64_t q = 0; q < quads; ++q, pixels += 4, factors += 256) {
    __m512i l[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      l[i] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(lanes, pixels[i] + channel), flip);
    const __m512i a = _mm512_unpacklo_epi8(l[0], l[1]), b = _mm512_unpackhi_epi8(l[0], l[1]);
    const __m512i c = _mm512_unpacklo_epi8(l[2], l[3]), d = _mm512_unpackhi_epi8(l[2], l[3]);
    sums[0] = _mm512_dpbusd_epi32(sums[0], _mm512_unpacklo_epi16(a, c), _mm512_loadu_si512(factors));
    sums[1] = _mm512_dpbusd_epi32(sums[1], _mm512_unpackhi_epi16(a, c), _mm512_loadu_si512(factors + 64));
    sums[2] = _mm512_dpbusd_epi32(sums[2], _mm512_unpacklo_epi16(b, d), _mm512_loadu_si512(factors + 128));
    sums[3] = _mm512_dpbusd_epi32(sums[3], _mm512_unpackhi_epi16(b, d), _mm512_loadu_si512(factors + 192));
  }
}

CNMIX_VNNI void multiply_positions(const uint8_t* const* pixels, int64_t count, int64_t quads, int64_t channel,
                                   int64_t width, const uint8_t* factors, const int32_t* corrections, int32_t* out) {
  const __mmask64 lanes = width >= 64 ? ~__mmask64{0} : (__mmask64{1} << width) - 1;
  for (int64_t i = 0; i < count; ++i, pixels += 4 * quads, out += kLanes) {
    __m512i sums[4];
    multiply_position(pixels, quads, channel, lanes, factors, corrections, sums);
    transpose_lanes(sums);
    for (int j = 0; j < 4; ++j) _mm512_storeu_si512(out + 16 * j, sums[j]);
  }
}

int64_t rows_each(const CnmixStep& step) {
  const int64_t blocks = (step.channels + kLanes - 1) / kLanes;
  return std::max<int64_t>(kTileRows, kPositionsOfTask / blocks / step.tiles / kTileRows * kTileRows);
}

thread_local std::vector<const uint8_t*> pixels_memory;
thread_local std::vector<uint8_t> zeros_memory;

}  // namespace

int64_t depthwise_tasks(const CnmixStep& step) {
  return step.channels == 0 ? 0 : (step.rows + rows_each(step) - 1) / rows_each(step);
}

void run_depthwise(const Job& job, int64_t task, Worker& worker) {
  const CnmixStep& step = *job.step;
  const CnmixWindows& w = step.windows;
  const int64_t quads = step.tiles, each = rows_each(step);
  std::vector<const uint8_t*>& pixels = pixels_memory;
  std::vector<uint8_t>& zeros = zeros_memory;
  if (zeros.size() < static_cast<size_t>(step.channels)) zeros.resize(static_cast<size_t>(step.channels));
  pixels.resize(static_cast<size_t>(kTileRows * 4 * quads));
  alignas(64) int32_t sums[kTileRows * kLanes];
  WindowPlace place;
  for (int64_t row = task * each, end = std::min(step.rows, row + each); row < end; row += kTileRows) {
    const int64_t count = std::min(kTileRows, end - row);
    for (int64_t i = 0; i < count; ++i) {
      place.move_to(w, row + i);
      find_pixels(job.source, w, place, zeros.data(), quads, pixels.data() + i * 4 * quads);
    }
    const PanelRows rows = whole_panel(row, count);
    for (int64_t c = 0; c < step.channels; c += kLanes) {
      const int64_t width = std::min(kLanes, step.channels - c);
      multiply_positions(pixels.data(), count, quads, c, width, step.weights + c * 4 * quads, step.corrections + c, sums);
      for (int64_t j = 0; j < width; j += kTileRows)
        finish_sums(job.chain, sums + j, kLanes, rows, c + j, width - j, worker.bad);
    }
  }
}

#endif

}  // namespace cnmix
