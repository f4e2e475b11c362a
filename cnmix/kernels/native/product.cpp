// The integer matrix product with everything around it: operands are packed block by block from where they lie (rows,
// columns or windows of an image), multiplied on the processor's integer units, and the exact sums are rounded once,
// scaled and given their bias before they leave the cache.
//
// A number of D bytes is D digits, the highest one signed. For each weight 2**(8 s) the digit products i + j = s add up
// in one int32 sum (exact for the depth of K taken at once); the weights come together in int64.

#include <atomic>
#include <cstdlib>

#include "avx512.h"
#include "product.h"
#include "scratch.h"
#include "tiles.h"

namespace cnmix {
namespace {

#if defined(CNMIX_X86)

constexpr int64_t kDepth = 8192;             // bytes of K at once; sums of digit products fit int32 fourfold
constexpr int64_t kBlockBytes = 512 << 10;   // of packed a: half of the second-level cache
constexpr int64_t kColumnBytes = 768 << 10;  // of packed b that one thread goes over again and again
constexpr int64_t kRightBytes = 16 << 20;    // of packed b
constexpr int64_t kLongestInt32 = 131071;    // of K: 131072 * 2**14 is 2**31
constexpr int64_t kMostKept = 64 << 20;      // bytes of sums that a thread keeps
constexpr int kMostWeights = 7;

thread_local Scratch left_memory, right_memory, sums_memory;

// What one piece of K and of b's rows has in common.
struct Piece {
  const CnmixProduct* job;
  Packing left, right;
  const uint8_t* right_panels;
  int64_t column_first;     // panel of b that right_panels begins with
  int64_t columns;          // panels
  int64_t weights;
  bool first, last;         // of K
  // Sums so far, where K has several pieces: [row panel][column panel of this piece][16 x 16], int32, int64, or pairs.
  uint8_t* partial;
  int64_t partial_bytes;    // of one element; 0 without
};

// To bfloat16 as torch rounds it, to nearest, ties to even; every NaN to the same one.
CNMIX_AVX512 inline __m256i to_bfloat16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
  const __mmask16 number = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_srli_epi32(_mm512_set1_epi32(0x7fc0), number, rounded, 16));
}

// Stores some lanes to out[at + lane].
CNMIX_AVX512 inline void store_part(void* out, bool half, int64_t at, __mmask16 lanes, __m512 x) {
  if (half)
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out) + at, lanes, to_bfloat16(x));
  else
    _mm512_mask_storeu_ps(static_cast<float*>(out) + at, lanes, x);
}

// Writes a tile of sixteen registers, scaled and with their bias: rows as they lie, or columns of an image's positions.
CNMIX_AVX512 inline void write_tile(const CnmixProduct& job, int64_t row, int64_t column, __m512* r) {
  const int64_t height = std::min(kTileRows, job.m - row), width = std::min(kTileRows, job.n - column);
  const __mmask16 lanes = first_lanes(width);
  const __m512 scale = _mm512_set1_ps(job.scale);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_mul_ps(r[i], scale);
  if (job.bias) {
    const __m512 bias = _mm512_maskz_loadu_ps(lanes, job.bias + column);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_add_ps(r[i], bias);
  }
  const bool half = job.out_bytes == 2;
  if (!job.positions) {
    const int64_t stride = job.row_stride, at = row * stride + column;
    if (height == kTileRows && width == kTileRows && !half) {
      float* to = static_cast<float*>(job.out) + at;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_ps(to + i * stride, r[i]);
      return;
    }
    for (int64_t i = 0; i < height; ++i) store_part(job.out, half, at + i * stride, lanes, r[i]);
    return;
  }
  transpose_registers(reinterpret_cast<__m512i*>(r));
  for (int64_t done = 0; done < height;) {  // a tile may reach into further images
    const int64_t image = (row + done) / job.positions, position = (row + done) % job.positions;
    const int64_t count = std::min(height - done, job.positions - position), stride = job.positions;
    const __mmask16 part = static_cast<__mmask16>(first_lanes(count) << done);
    const int64_t at = image * job.image_stride + column * stride + position - done;
    for (int64_t j = 0; j < width; ++j) store_part(job.out, half, at + j * stride, part, r[j]);
    done += count;
  }
}

// int8: int32 sums.
CNMIX_AVX512 void finish_tile(const Piece& p, const int32_t (*sums)[kTileRows], int64_t row, int64_t column,
                              uint8_t* partial) {
  __m512i v[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = _mm512_load_si512(sums[i]);
  if (partial) {
    int32_t* kept = reinterpret_cast<int32_t*>(partial);
    if (!p.first)
      for (int i = 0; i < 16; ++i) v[i] = _mm512_add_epi32(v[i], _mm512_loadu_si512(kept + 16 * i));
    if (!p.last) {
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(kept + 16 * i, v[i]);
      return;
    }
  }
  __m512 out[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) out[i] = _mm512_cvtepi32_ps(v[i]);
  write_tile(*p.job, row, column, out);
}

// Eight integers high * 2**32 + low, with low in [0, 2**32), as floats. Where the number fits int64, convert it; else
// `high` has more bits than a float keeps, and its last bit, set for a rest below, makes the one rounding come out as on
// the whole number.
CNMIX_AVX512 inline __m256 round_pairs(__m512i high, __m512i low) {
  const __m512i limit = _mm512_set1_epi64(int64_t{1} << 30);
  const __m512i whole = _mm512_or_si512(_mm512_slli_epi64(high, 32), low);
  const __m512i jammed = _mm512_mask_or_epi64(high, _mm512_test_epi64_mask(low, low), high, _mm512_set1_epi64(1));
  const __mmask8 fits = _mm512_cmplt_epi64_mask(_mm512_abs_epi64(high), limit);
  const __m256 large = _mm256_mul_ps(_mm512_cvtepi64_ps(jammed), _mm256_set1_ps(4294967296.0f));
  return _mm256_mask_mov_ps(large, fits, _mm512_cvtepi64_ps(whole));
}

// Several digits, or a very long K. Up to four weights fit int64; with more, the sums are pairs as above.
CNMIX_AVX512 void finish_wide_tile(const Piece& p, const TileSums* sums, int i, int j, int64_t row, int64_t column,
                                   uint8_t* partial) {
  alignas(64) float out[16][16];
  int64_t* kept = reinterpret_cast<int64_t*>(partial);
  const bool pairs = p.weights > 4;
  for (int r = 0; r < 16; ++r)
    for (int half = 0; half < 16; half += 8) {
      __m512i low = _mm512_setzero_si512(), high = low;
      for (int64_t s = 0; s < p.weights; ++s) {
        const __m256i part = _mm256_load_si256(reinterpret_cast<const __m256i*>(sums[s][i][j][r] + half));
        const __m128i shift = _mm_cvtsi64_si128(8 * (s % 4));
        const __m512i shifted = _mm512_sll_epi64(_mm512_cvtepi32_epi64(part), shift);
        if (s < 4)
          low = _mm512_add_epi64(low, shifted);
        else
          high = _mm512_add_epi64(high, shifted);
      }
      int64_t* low_kept = kept ? kept + 32 * r + half : nullptr;
      if (kept && !p.first) {
        low = _mm512_add_epi64(low, _mm512_loadu_si512(low_kept));
        if (pairs) high = _mm512_add_epi64(high, _mm512_loadu_si512(low_kept + 16));
      }
      if (pairs) {
        high = _mm512_add_epi64(high, _mm512_srai_epi64(low, 32));
        low = _mm512_and_si512(low, _mm512_set1_epi64(0xffffffff));
      }
      if (!p.last) {
        _mm512_storeu_si512(low_kept, low);
        if (pairs) _mm512_storeu_si512(low_kept + 16, high);
        continue;
      }
      _mm256_store_ps(out[r] + half, pairs ? round_pairs(high, low) : _mm512_cvtepi64_ps(low));
    }
  if (!p.last) return;
  __m512 registers[16];
  for (int r = 0; r < 16; ++r) registers[r] = _mm512_load_ps(out[r]);
  write_tile(*p.job, row, column, registers);
}

// Up to two by two panels of the output, with 32 x 32 sums for each weight.
struct Block {
  int64_t row = 0, column = 0;   // panels
  int64_t rows = 0, columns = 0;
  TileSums* sums = nullptr;
};

constexpr int kTilesOfBlock = 4;

// Rounds and writes one of the block's four tiles.
void finish_one(const Piece& p, const Block& block, int tile) {
  const int64_t i = tile / 2, j = tile % 2;
  if (i >= block.rows || j >= block.columns) return;
  const int64_t row = block.row + i, column = block.column + j;
  uint8_t* partial = nullptr;
  if (p.partial) partial = p.partial + (row * p.columns + column - p.column_first) * p.partial_bytes * 256;
  if (p.partial_bytes > 4 || p.weights > 1)
    finish_wide_tile(p, block.sums, i, j, row * kTileRows, column * kTileRows, partial);
  else
    finish_tile(p, block.sums[0][i][j], row * kTileRows, column * kTileRows, partial);
}

#if defined(CNMIX_HAS_AMX)
// All digit products of a block. A digit's tiles lie `panels.tiles` apart in its panel. The block before it is finished
// meanwhile, a tile at a time between stretches of products: the tile unit is slow to start on what stands behind much
// other work.
CNMIX_AMX void multiply_amx(const Piece& p, const Panels& panels, const Block& block, const Block& before) {
  const int64_t a_digits = p.job->a.digits, b_digits = p.job->b.digits, digit = panels.tiles * kTileBytes;
  int finished = 0;
  for (int64_t s = 0; s < p.weights; ++s) {
    zero_tiles();
    for (int64_t i = std::max<int64_t>(0, s - b_digits + 1); i <= s && i < a_digits; ++i)
      for (int64_t done = 0; done < panels.tiles;) {
        Panels part = panels;
        part.tiles = std::min((panels.tiles + kTilesOfBlock - 1) / kTilesOfBlock, panels.tiles - done);
        for (int side = 0; side < 2; ++side) {
          if (part.a[side]) part.a[side] += i * digit + done * kTileBytes;
          if (part.b[side]) part.b[side] += (s - i) * digit + done * kTileBytes;
        }
        add_digits_amx(part, i == a_digits - 1, s - i == b_digits - 1);
        done += part.tiles;
        if (finished < kTilesOfBlock) finish_one(p, before, finished++);
      }
    store_tiles(block.sums[s]);
  }
  while (finished < kTilesOfBlock) finish_one(p, before, finished++);
}
#endif

// Rows of a in a block, packed by the thread that multiplies it, by a share of b's columns.
void multiply_rows(const Piece& p, int64_t panel_first, int64_t panel_last, int64_t column_first, int64_t column_last) {
  const int64_t height = panel_last - panel_first, tiles = p.left.tiles();
  const int64_t left_bytes = p.left.panel_bytes(), right_bytes = p.right.panel_bytes();
  uint8_t* left = left_memory.get(height * left_bytes + height * kTileRows * 4);
  if (!left) std::abort();  // about half a megabyte
  pack_panels(p.left, panel_first, panel_last, left);
  int32_t* row_sums = reinterpret_cast<int32_t*>(left + height * left_bytes);
  const bool vnni = active_isa == AVX512_VNNI;
  if (vnni) sum_rows_vnni(left, height, tiles, row_sums);
  alignas(64) TileSums sums[2][kMostWeights];
  Block before;
  const auto multiply_block = [&](int64_t r, int64_t c, int64_t to) {
    const Block block{panel_first + r, c, std::min<int64_t>(2, height - r), std::min<int64_t>(2, to - c),
                      before.sums == sums[0] ? sums[1] : sums[0]};
    const uint8_t *a = left + r * left_bytes, *b = p.right_panels + (c - p.column_first) * right_bytes;
    const Panels panels{
        {a, block.rows > 1 ? a + left_bytes : nullptr}, {b, block.columns > 1 ? b + right_bytes : nullptr}, tiles};
    if (vnni) {
      multiply_vnni(panels, row_sums + r * kTileRows, block.sums[0]);
      for (int tile = 0; tile < kTilesOfBlock; ++tile) finish_one(p, before, tile);
    }
#if defined(CNMIX_HAS_AMX)
    if (!vnni) multiply_amx(p, panels, block, before);
#endif
    before = block;
  };
  // As many columns as the cache holds; the inner loop goes along the lines of the output.
  const int64_t together = std::max<int64_t>(2, kColumnBytes / right_bytes / 2 * 2);
  for (int64_t from = column_first; from < column_last; from += together) {
    const int64_t to = std::min(column_last, from + together);
    if (p.job->positions)
      for (int64_t c = from; c < to; c += 2)
        for (int64_t r = 0; r < height; r += 2) multiply_block(r, c, to);
    else
      for (int64_t r = 0; r < height; r += 2)
        for (int64_t c = from; c < to; c += 2) multiply_block(r, c, to);
  }
  for (int tile = 0; tile < kTilesOfBlock; ++tile) finish_one(p, before, tile);
}

#if defined(CNMIX_HAS_AMX)
void begin_thread() {
  if (active_isa == AMX) configure_tiles();
}
void end_thread() {
  if (active_isa == AMX) release_tiles();
}
#else
void begin_thread() {}
void end_thread() {}
#endif

// Calls task(index) for each index, whichever thread is free.
template <typename Task>
void run_tasks(int64_t count, int64_t threads, const Task& task) {
  if (threads <= 1) {
    begin_thread();
    for (int64_t i = 0; i < count; ++i) task(i);
    end_thread();
    return;
  }
#if defined(_OPENMP)
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    begin_thread();
    for (int64_t i = next++; i < count; i = next++) task(i);
    end_thread();
  }
#endif
}

void multiply_piece(const Piece& p, int64_t operations) {
  const int64_t row_panels = panels_of(p.job->m);
  int64_t threads = std::min<int64_t>(max_threads(), operations / kOperationsPerThread);
  int64_t block = std::max<int64_t>(2, std::min<int64_t>(32, kBlockBytes / p.left.panel_bytes()) / 2 * 2);
  while (block > 2 && (row_panels + block - 1) / block < 4 * threads) block -= 2;
  const int64_t blocks = (row_panels + block - 1) / block;
  const int64_t pairs = (p.columns + 1) / 2;
  // Few rows: several threads share a block, each packs it for its own columns.
  const int64_t shares = std::max<int64_t>(1, std::min(pairs, blocks >= threads ? 1 : (2 * threads + blocks - 1) / blocks));
  threads = std::min(threads, blocks * shares);
  run_tasks(blocks * shares, threads, [&](int64_t task) {
    const int64_t first = task / shares * block, share = task % shares;
    const int64_t begin = pairs * share / shares * 2, end = std::min(p.columns, pairs * (share + 1) / shares * 2);
    if (begin < end)
      multiply_rows(p, first, std::min(row_panels, first + block), p.column_first + begin, p.column_first + end);
  });
}

#endif

}  // namespace

#if defined(CNMIX_X86)

bool multiply(const CnmixProduct& job) {
  const int64_t digits = std::max(job.a.digits, job.b.digits);
  const int64_t pieces = std::max<int64_t>(1, (job.k * digits + kDepth - 1) / kDepth);
  const int64_t depth = std::max(kTileDepth, (job.k + pieces - 1) / pieces / kTileDepth * kTileDepth + kTileDepth);
  const int64_t padded = (std::max<int64_t>(1, std::min(depth, job.k)) + kTileDepth - 1) / kTileDepth * kTileDepth;
  const int64_t most_columns = std::max<int64_t>(2, kRightBytes / (padded * kTileRows * job.b.digits) / 2 * 2);
  const int64_t all_columns = panels_of(job.n);
  Piece p{};
  p.job = &job;
  p.weights = job.a.digits + job.b.digits - 1;
  p.partial_bytes = p.weights == 1 && job.k <= kLongestInt32 ? 4 : 16;
  const uint8_t flip = active_isa == AVX512_VNNI ? 0x80 : 0;
  for (p.column_first = 0; p.column_first < all_columns; p.column_first += most_columns) {
    p.columns = std::min(most_columns, all_columns - p.column_first);
    p.partial = job.k > depth ? sums_memory.get(panels_of(job.m) * p.columns * 256 * p.partial_bytes) : nullptr;
    if (job.k > depth && !p.partial) return false;
    // Also once for an empty K: its sums are zero.
    for (int64_t k = 0; k == 0 || k < job.k; k += depth) {
      const int64_t count = std::min(depth, job.k - k);
      p.left = {&job.a, job.m, k, count, ROWS, 0};
      p.right = {&job.b, job.n, k, count, QUADS, flip};
      p.first = k == 0;
      p.last = k + count >= job.k;
      uint8_t* right = right_memory.get(p.columns * p.right.panel_bytes());
      if (!right) return false;
      pack_all(p.right, p.column_first, p.column_first + p.columns, right);
      p.right_panels = right;
      multiply_piece(p, job.m * p.columns * kTileRows * count * job.a.digits * job.b.digits);
    }
  }
  if (sums_memory.size() > kMostKept) sums_memory.release();
  return true;
}

#else

bool multiply(const CnmixProduct&) { return false; }

#endif

}  // namespace cnmix

using namespace cnmix;

// Whether products with operands of these digits are served: 0, or 1.
CNMIX_API int cnmix_multiplies(int a_digits, int b_digits) {
  if (active_isa == AMX) return 1;
  return active_isa == AVX512_VNNI && a_digits == 1 && b_digits == 1;
}

// Returns 1, or 0 where memory was missing.
CNMIX_API int cnmix_multiply(const CnmixProduct* job) { return multiply(*job); }
