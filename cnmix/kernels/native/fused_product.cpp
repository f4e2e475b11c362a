// A product of a plan: int8 rows by packed weights, and the step's stages on the sums while they are in the cache.

#include <vector>

#include "chain.h"
#include "fused_tiles.h"

namespace cnmix {

#if defined(CNMIX_X86)

namespace {

constexpr int64_t kRowBytes = 512 << 10;    // of prepared rows: a quarter of the second-level cache
constexpr int64_t kTasksPerThread = 4;      // so that a thread that is held up is helped out
constexpr int64_t kTilesOfBlock = 4;
constexpr int64_t kNearTiles = 12;          // of K: two panels of columns and two of rows fit the first-level cache
constexpr int64_t kNearBytes = 1 << 20;     // of columns that stay in the second-level cache

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool by_lines(const CnmixStep& step) { return step.arrangement == IMAGE_LINES || step.arrangement == LINE_WINDOWS; }

int64_t input_lines(const CnmixWindows& w, int64_t lines) {
  return (lines - 1) * w.stride[1] + (w.kernel[1] - 1) * w.dilation[1] + 1;
}

CnmixLayout lay_out(const CnmixStep& step, int64_t threads) {
  const CnmixWindows& w = step.windows;
  CnmixLayout l{};
  l.threads = threads;
  l.panels = panels_of(step.channels / step.groups);
  const int64_t pairs = ceil_div(l.panels, 2), weights = l.panels * step.tiles * kTileBytes;
  const int64_t source = w.images * w.size[0] * w.size[1] * w.size[2] * w.run;
  // Each share of the columns reads all rows, each part of the rows all weights: what is smaller is read often.
  const bool by_columns = weights > source && pairs >= threads;
  const int64_t tasks = ceil_div(kTasksPerThread * threads, step.groups);
  if (by_lines(step)) {
    const int64_t taps = (w.kernel[2] - 1) * w.dilation[2] + 1, step2 = w.stride[2];
    l.pitch = ceil_div((w.output[2] - 1) * step2 + taps, step2);
    l.width = l.pitch * step2;
    const int64_t line_bytes = l.width * w.pixel, lines = w.output[1];
    int64_t best = 0;
    for (int64_t parts = 1; parts <= lines; ++parts) {
      const int64_t each = ceil_div(lines, parts);
      const int64_t packed = step.arrangement == LINE_WINDOWS ? each * l.pitch * step.tiles * kTileDepth : 0;
      if (each > 1 && input_lines(w, each) * line_bytes + packed > kRowBytes) continue;
      const int64_t count = w.images * ceil_div(lines, each) * step.groups;
      // The time of the thread that has most, in tiles and copied lines of cache; smaller tasks are worth a little.
      const int64_t one = panels_of(each * l.pitch) * l.panels * step.tiles * 16 + input_lines(w, each) * line_bytes / 32;
      const int64_t shared = by_columns ? w.images * ceil_div(lines, each) : ceil_div(count, threads);
      const int64_t cost = shared * one * (by_columns || shared >= kTasksPerThread ? 16 : 17);
      if (best == 0 || cost < best) {
        best = cost;
        l.rows_each = each;
      }
      if (parts >= 2 * tasks && best) break;
    }
    l.tasks_of_image = ceil_div(lines, l.rows_each);
    l.row_tasks = w.images * l.tasks_of_image;
    l.lines_together = (input_lines(w, l.rows_each) - 1) / w.stride[1] + 1;
  } else {
    const int64_t panels = panels_of(step.rows);
    const int64_t row_bytes = step.arrangement == LYING_ROWS ? w.pixel : step.tiles * kTileDepth;
    const int64_t most = std::max<int64_t>(2, kRowBytes / (row_bytes * kTileRows) / 2 * 2);
    const int64_t wanted = by_columns ? 1 : tasks;
    l.rows_each = std::min(most, std::max<int64_t>(2, ceil_div(ceil_div(panels, wanted), 2) * 2));
    l.row_tasks = ceil_div(panels, l.rows_each);
  }
  l.shares = std::max<int64_t>(1, std::min(pairs, ceil_div(tasks, std::max<int64_t>(1, l.row_tasks))));
  return l;
}

// Rows of one task as the inner loops read them.
struct Prepared {
  std::vector<PanelRows> panels;
  std::vector<const uint8_t*> data;   // of each panel
  std::vector<int64_t> offsets;       // of each tile
  int64_t stride = 0;
};

thread_local Scratch row_memory;
thread_local Prepared prepared;

// Copies bytes; `flip` makes signed values unsigned ones, 128 larger.
CNMIX_AVX512 void copy_bytes(uint8_t* to, const uint8_t* from, int64_t bytes, bool flip) {
  if (!flip) {
    std::memcpy(to, from, static_cast<size_t>(bytes));
    return;
  }
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(0x80));
  int64_t i = 0;
  for (; i + 64 <= bytes; i += 64)
    _mm512_storeu_si512(to + i, _mm512_xor_si512(_mm512_loadu_si512(from + i), mask));
  for (; i < bytes; ++i) to[i] = from[i] ^ 0x80;
}

bool prepare_lying(const Job& job, Prepared& ready, int64_t group, int64_t first, int64_t last, bool flip) {
  const CnmixStep& step = *job.step;
  const int64_t pixel = step.windows.pixel, panel = kTileRows * pixel;
  const int64_t end = std::min(step.rows, last * kTileRows), rows = end - first * kTileRows;
  const uint8_t* data = job.source + first * panel;
  // Tiles read past the end of a row: what they meet is multiplied by zeros, but must be memory.
  const int64_t behind = (step.groups - 1) * step.windows.run + step.tiles * kTileDepth - pixel;
  const int64_t within = (step.rows * pixel - std::max<int64_t>(0, behind)) / panel;
  const int64_t safe = flip ? 0 : std::max<int64_t>(0, std::min(last, within) - first);
  const int64_t copied = rows - safe * kTileRows;
  uint8_t* memory = row_memory.get((copied + kTileRows) * pixel + step.tiles * kTileDepth);
  if (!memory) return false;
  if (copied > 0) copy_bytes(memory, data + safe * panel, copied * pixel, flip);
  ready.stride = pixel;
  ready.offsets.resize(static_cast<size_t>(step.tiles));
  for (int64_t t = 0; t < step.tiles; ++t) ready.offsets[static_cast<size_t>(t)] = t * kTileDepth;
  for (int64_t p = first; p < last; ++p) {
    const int64_t at = p - first;
    ready.data.push_back((at < safe ? data + at * panel : memory + (at - safe) * panel) + group * step.windows.run);
    ready.panels.push_back(whole_panel(p * kTileRows, step.rows - p * kTileRows));
  }
  return true;
}

// Rows or windows, copied into panels.
bool prepare_gathered(const Job& job, Prepared& ready, int64_t group, int64_t first, int64_t last, bool flip) {
  const CnmixStep& step = *job.step;
  const CnmixWindows& w = step.windows;
  CnmixOperand operand{};
  operand.data = job.source + group * w.run;
  operand.digits = 1;
  operand.stride = w.pixel;
  operand.windows = step.arrangement == LYING_ROWS ? nullptr : &w;
  const int64_t depth = w.kernel[0] * w.kernel[1] * w.kernel[2] * w.run;
  const Packing packing{&operand, step.rows, 0, depth, ROWS, static_cast<uint8_t>(flip ? 0x80 : 0)};
  const int64_t panel = packing.panel_bytes();
  uint8_t* memory = row_memory.get((last - first) * panel);
  if (!memory) return false;
  pack_panels(packing, first, last, memory);
  ready.stride = kTileDepth;
  ready.offsets.resize(static_cast<size_t>(step.tiles));
  for (int64_t t = 0; t < step.tiles; ++t) ready.offsets[static_cast<size_t>(t)] = t * kTileBytes;
  for (int64_t p = first; p < last; ++p) {
    ready.data.push_back(memory + (p - first) * panel);
    ready.panels.push_back(whole_panel(p * kTileRows, step.rows - p * kTileRows));
  }
  return true;
}

// Copies `rows` windows, `across` bytes apart, whose taps in each of some lines are one run, into rows of `depth` bytes.
// Runs are copied 32 bytes at a time: what is too much is overwritten by the next.
CNMIX_AVX512 void copy_windows(const uint8_t* lines, const std::vector<int64_t>& begins, int64_t run, int64_t across,
                               int64_t rows, int64_t depth, uint8_t* to) {
  for (int64_t r = 0; r < rows; ++r, lines += across, to += depth) {
    uint8_t* at = to;
    for (const int64_t begin : begins) {
      for (int64_t i = 0; i < run; i += 32)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + i),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lines + begin + i)));
      at += run;
    }
  }
}

// Lines [first, last) of an image's output.
bool prepare_lines(const Job& job, Prepared& ready, const CnmixLayout& l, int64_t group, int64_t image, int64_t first, int64_t last, bool flip) {
  const CnmixStep& step = *job.step;
  const CnmixWindows& w = step.windows;
  const int64_t lines = last - first, across = w.stride[2], down = w.stride[1], pixel = w.pixel;
  const int64_t line = l.width * pixel, panels = panels_of(lines * l.pitch);
  const int64_t past = (kTileRows * across + w.kernel[2] * w.dilation[2]) * pixel + step.tiles * kTileDepth + 64;
  const bool copied = step.arrangement == LINE_WINDOWS;
  const int64_t depth = step.tiles * kTileDepth, line_memory = (down * l.lines_together * line + past + 63) / 64 * 64;
  uint8_t* memory = row_memory.get(line_memory + (copied ? panels * kTileRows * depth + past : 0));
  if (!memory) return false;
  const uint8_t* from = job.source + image * w.size[1] * w.size[2] * pixel;
  const int zero = flip ? 0x80 : 0;
  const int64_t left = std::min(std::max<int64_t>(0, w.before[2]), l.width), skipped = std::max<int64_t>(0, -w.before[2]);
  const int64_t there = std::max<int64_t>(0, std::min(l.width - left, w.size[2] - skipped));
  for (int64_t i = 0, needed = input_lines(w, lines); i < needed; ++i) {
    bool met = false;
    for (int64_t k = 0; k < w.kernel[1] && !met; ++k) met = k * w.dilation[1] % down == i % down;
    if (!met) continue;
    uint8_t* to = memory + (i % down * l.lines_together + i / down) * line;
    const int64_t y = first * down - w.before[1] + i;
    if (y < 0 || y >= w.size[1]) {
      std::memset(to, zero, static_cast<size_t>(line));
      continue;
    }
    std::memset(to, zero, static_cast<size_t>(left * pixel));
    copy_bytes(to + left * pixel, from + (y * w.size[2] + skipped) * pixel, there * pixel, flip);
    std::memset(to + (left + there) * pixel, zero, static_cast<size_t>((l.width - left - there) * pixel));
  }
  ready.stride = across * pixel;
  ready.offsets.clear();
  // One run of K for the taps of a line where they lie side by side, else one for each tap.
  const bool joined = w.run == pixel && w.dilation[2] == 1;
  const int64_t runs = joined ? 1 : w.kernel[2], run = joined ? w.kernel[2] * w.run : w.run;
  for (int64_t k1 = 0; k1 < w.kernel[1]; ++k1)
    for (int64_t k2 = 0; k2 < runs; ++k2)
      for (int64_t t = 0; t < run; t += copied ? run : kTileDepth) {
        const int64_t y = k1 * w.dilation[1];
        ready.offsets.push_back((y % down * l.lines_together + y / down) * line + k2 * w.dilation[2] * pixel + t);
      }
  const uint8_t* panel = memory + group * w.run;
  if (copied) {
    uint8_t* windows = memory + line_memory;
    copy_windows(panel, ready.offsets, run, ready.stride, panels * kTileRows, depth, windows);
    ready.stride = depth;
    ready.offsets.resize(static_cast<size_t>(step.tiles));
    for (int64_t t = 0; t < step.tiles; ++t) ready.offsets[static_cast<size_t>(t)] = t * kTileDepth;
    panel = windows;
  }
  int64_t x = 0, y = 0, row = (image * w.output[1] + first) * w.output[2];
  for (int64_t p = 0; p < panels; ++p) {
    ready.data.push_back(panel + p * kTileRows * ready.stride);
    PanelRows rows{row, 0, {}};
    for (int64_t r = 0; r < kTileRows && y < lines;) {
      const int64_t there = std::min(kTileRows - r, w.output[2] - x);
      if (there > 0) rows.add(r, there);
      const int64_t passed = std::min(kTileRows - r, l.pitch - x);
      r += passed;
      x += passed;
      if (x == l.pitch) {
        x = 0;
        ++y;
      }
    }
    rows.end();
    row += rows.count;
    ready.panels.push_back(rows);
  }
  return true;
}

// Up to two by two panels of the output.
struct Block {
  int64_t row = 0, column = 0;   // panels: of the prepared rows, of the group's columns
  int64_t rows = 0, columns = 0;
  TileSums* sums = nullptr;
};

struct Product {
  const Job& job;
  Worker& worker;
  const Prepared& ready;
  int64_t group, columns;        // channels of the group

  // Finishes one of the block's four tiles.
  void finish(const Block& block, int64_t tile) const {
    const int64_t i = tile / 2, j = tile % 2;
    if (i >= block.rows || j >= block.columns) return;
    const int64_t column = (block.column + j) * kTileRows;
    finish_sums(job.chain, (*block.sums)[i][j][0], kTileRows, ready.panels[static_cast<size_t>(block.row + i)],
                group * columns + column, columns - column, worker.bad);
  }
};

#if defined(CNMIX_HAS_AMX)
// The sums of a block. The block before it is finished meanwhile, a tile at a time between products: the tile unit runs
// dry behind longer work.
template <bool two_rows, bool two_columns>
CNMIX_AMX void multiply_block(const Product& product, const Strips& strips, const Block& block, const Block& before) {
  zero_tiles();
  int64_t finished = 0;
  for (int64_t t = 0; t < strips.tiles; ++t) {
    add_tile<two_rows, two_columns>(strips, t);
    for (; finished * strips.tiles < kTilesOfBlock * (t + 1); ++finished) product.finish(before, finished);
  }
  store_tiles(*block.sums);
}

CNMIX_AMX void multiply_amx(const Product& product, const Strips& strips, const Block& block, const Block& before) {
  if (block.rows > 1)
    block.columns > 1 ? multiply_block<true, true>(product, strips, block, before)
                      : multiply_block<true, false>(product, strips, block, before);
  else
    block.columns > 1 ? multiply_block<false, true>(product, strips, block, before)
                      : multiply_block<false, false>(product, strips, block, before);
}
#endif

}  // namespace

void lay_out_product(CnmixStep& step, int64_t threads) {
  if (step.layout.threads != threads) step.layout = lay_out(step, threads);
}

int64_t product_tasks(const CnmixStep& step) { return step.layout.row_tasks * step.groups * step.layout.shares; }

void run_product(const Job& job, int64_t task, Worker& worker) {
  const CnmixStep& step = *job.step;
  const CnmixLayout& l = step.layout;
  Prepared& ready = prepared;
  const int64_t share = task % l.shares, rows = task / l.shares, group = rows % step.groups, part = rows / step.groups;
  if (worker.prepared_step != &step || worker.prepared_rows != rows) {
    ready.panels.clear();
    ready.data.clear();
    worker.prepared_step = nullptr;
    bool there;
    if (by_lines(step)) {
      const int64_t first = part % l.tasks_of_image * l.rows_each;
      there = prepare_lines(job, ready, l, group, part / l.tasks_of_image, first,
                            std::min(step.windows.output[1], first + l.rows_each), worker.vnni);
    } else {
      const int64_t first = part * l.rows_each, last = std::min(panels_of(step.rows), first + l.rows_each);
      const bool lying = step.arrangement == LYING_ROWS && step.windows.pixel % kQuickStart == 0;
      there = lying ? prepare_lying(job, ready, group, first, last, worker.vnni)
                    : prepare_gathered(job, ready, group, first, last, worker.vnni);
    }
    if (!there) {
      worker.failed = true;
      return;
    }
    worker.prepared_step = &step;
    worker.prepared_rows = rows;
  }
  const int64_t pairs = ceil_div(l.panels, 2), panel = step.tiles * kTileBytes;
  const int64_t begin = pairs * share / l.shares * 2, end = std::min(l.panels, pairs * (share + 1) / l.shares * 2);
  const Product product{job, worker, ready, group, step.channels / step.groups};
  const uint8_t* weights = step.weights + group * l.panels * panel;
  const int32_t* corrections = step.corrections + group * l.panels * kTileRows;
  const int64_t height = static_cast<int64_t>(ready.panels.size());
  alignas(64) TileSums sums[2];
  Block before;
  const bool rows_first = step.tiles > kNearTiles && (end - begin) * panel <= kNearBytes;
  const auto multiply = [&](int64_t r, int64_t c) {
    const Block block{r, c, std::min<int64_t>(2, height - r), std::min<int64_t>(2, end - c),
                      before.sums == &sums[0] ? &sums[1] : &sums[0]};
    const uint8_t* b = weights + c * panel;
    const Strips strips{{ready.data[static_cast<size_t>(r)],
                         block.rows > 1 ? ready.data[static_cast<size_t>(r + 1)] : nullptr},
                        {b, block.columns > 1 ? b + panel : nullptr},
                        ready.stride,
                        ready.offsets.data(),
                        step.tiles};
    if (worker.vnni) {
      const int32_t* const begins[2] = {corrections + c * kTileRows, corrections + (c + 1) * kTileRows};
      multiply_strips_vnni(strips, begins, *block.sums);
      for (int64_t tile = 0; tile < kTilesOfBlock; ++tile) product.finish(before, tile);
    }
#if defined(CNMIX_HAS_AMX)
    if (!worker.vnni) multiply_amx(product, strips, block, before);
#endif
    before = block;
  };
  if (rows_first)
    for (int64_t r = 0; r < height; r += 2)
      for (int64_t c = begin; c < end; c += 2) multiply(r, c);
  else
    for (int64_t c = begin; c < end; c += 2)
      for (int64_t r = 0; r < height; r += 2) multiply(r, c);
  for (int64_t tile = 0; tile < kTilesOfBlock; ++tile) product.finish(before, tile);
}

#endif

}  // namespace cnmix

using namespace cnmix;

#if defined(CNMIX_X86)

// Packs int8 (rows, K) for products: 16 rows at a time, tile by tile, zeros behind the ends of both.
CNMIX_API void cnmix_pack_columns(const int8_t* matrix, int64_t rows, int64_t k, uint8_t* out) {
  CnmixOperand operand{};
  operand.data = matrix;
  operand.digits = 1;
  operand.stride = k;
  pack_all({&operand, rows, 0, k, QUADS, 0}, 0, panels_of(rows), out);
}

#else

CNMIX_API void cnmix_pack_columns(const int8_t*, int64_t, int64_t, uint8_t*) {}

#endif
