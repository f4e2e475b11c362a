// Quantize float32 to int8, int16 or 31 bits in int32, as kernels/reference.py defines it, with the statistics that the
// adaptive algorithm asks for. Work goes in blocks of fixed length, each done by one thread, and the sums of the blocks
// are added in order: results do not depend on the number of threads.

#include <cmath>
#include <limits>
#include <vector>

#include "rounding.h"

namespace cnmix {
namespace {

constexpr int64_t kBlock = 4096;  // elements
constexpr int64_t kGrain = 8;     // blocks that are worth a thread

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
  int64_t done = 0;
#if defined(CNMIX_X86)
  if (f.rounding == STOCHASTIC && active_isa >= AVX512 && index % 4 == 0)
    done = stochastic_groups_avx512(x, out, n, index, f);
#endif
  round_block(x + done, out + done, n - done, index + done, f);
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

// Sums of x per channel, where channel c has the elements with (index / inner) % channels == c.
struct ChannelSums {
  int64_t channels, inner;
  float* out;  // null where not wanted
};

CNMIX_INLINE void add_lines_body(const float* x, int64_t n, float* sums) {
  CNMIX_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) sums[i] += x[i];
}
CNMIX_DISPATCH(add_lines, (const float* x, int64_t n, float* sums), (x, n, sums))

// Sixteen lanes that are added in a fixed order, whatever vectors the compiler makes of them.
CNMIX_INLINE void add_run_body(const float* x, int64_t n, double* sum) {
  float lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int j = 0; j < 16; ++j) lanes[j] += x[i + j];
  for (int j = 0; i < n; ++i, ++j) lanes[j] += x[i];
  for (int half = 8; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  *sum += lanes[0];
}
CNMIX_DISPATCH(add_run, (const float* x, int64_t n, double* sum), (x, n, sum))

// Adds up the channels of one piece after another. Floats take few sums each before these go into doubles: gradients are
// often all alike, and then a long sum of floats rounds to the same side every time.
class ChannelAdder {
 public:
  explicit ChannelAdder(const ChannelSums& wanted) : wanted_(wanted) {
    if (!wanted.out) return;
    totals_.resize(static_cast<size_t>(wanted.channels));
    // Several pixels of few channels make one line.
    if (wanted.inner == 1)
      lanes_.resize(static_cast<size_t>(wanted.channels * std::max<int64_t>(1, kLeastLanes / wanted.channels)));
  }

  // Adds the elements from `index` on.
  void add(const float* x, int64_t n, int64_t index) {
    const int64_t length = wanted_.inner == 1 ? lanes() : wanted_.inner;
    for (int64_t done = 0; done < n;) {
      const int64_t first = (index + done) % length, count = std::min({n - done, length - first, kMostSums * 16});
      if (wanted_.inner == 1)
        add_lines(x + done, count, lanes_.data() + first);
      else
        add_run(x + done, count, &totals_[static_cast<size_t>((index + done) / wanted_.inner % wanted_.channels)]);
      done += count;
    }
    in_lanes_ += n;
    if (in_lanes_ >= kMostSums * lanes()) empty_lanes();
  }

  // Moves the sums since the last time to `out`.
  void finish_piece(double* out) {
    empty_lanes();
    std::copy(totals_.begin(), totals_.end(), out);
    std::fill(totals_.begin(), totals_.end(), 0.0);
  }

 private:
  static constexpr int64_t kLeastLanes = 512, kMostSums = 64;

  int64_t lanes() const { return static_cast<int64_t>(lanes_.size()); }

  void empty_lanes() {
    for (size_t first = 0; first < lanes_.size(); first += totals_.size())
      for (size_t c = 0; c < totals_.size(); ++c) totals_[c] += lanes_[first + c];
    std::fill(lanes_.begin(), lanes_.end(), 0.0f);
    in_lanes_ = 0;
  }

  const ChannelSums wanted_;
  std::vector<double> totals_;
  std::vector<float> lanes_;
  int64_t in_lanes_ = 0;
};

typedef uint32_t __attribute__((may_alias)) shared_bits;

CNMIX_INLINE void widen_body(const uint16_t* x, int64_t n, shared_bits* out) {
  CNMIX_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<uint32_t>(x[i]) << 16;
}
CNMIX_DISPATCH(widen, (const uint16_t* x, int64_t n, shared_bits* out), (x, n, out))

CNMIX_INLINE void checksum_block_body(const shared_bits* bits, int64_t n, int64_t first, uint64_t* sum) {
  uint64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += bits[i] * static_cast<uint64_t>(2 * (first + i) + 1);
  *sum = total;
}
CNMIX_DISPATCH(checksum_block, (const shared_bits* bits, int64_t n, int64_t first, uint64_t* sum), (bits, n, first, sum))

// Floats as they lie in memory, float32 or bfloat16, block by block: in lines of `columns`, `stride` apart, or dense where
// `columns` is 0.
struct Source {
  const void* data;
  bool half;
  int64_t columns = 0, stride = 0;

  // Elements from `at` on, brought together or widened in `buffer` where they must be.
  const float* block(int64_t at, int64_t n, float* buffer) const {
    if (!columns) {
      if (!half) return static_cast<const float*>(data) + at;
      widen(static_cast<const uint16_t*>(data) + at, n, reinterpret_cast<shared_bits*>(buffer));
      return buffer;
    }
    int64_t line = at / columns, from = at % columns;
    for (int64_t done = 0; done < n; ++line, from = 0) {
      const int64_t count = std::min(n - done, columns - from), place = line * stride + from;
      if (half)
        widen(static_cast<const uint16_t*>(data) + place, count, reinterpret_cast<shared_bits*>(buffer + done));
      else
        std::memcpy(buffer + done, static_cast<const float*>(data) + place, static_cast<size_t>(count) * 4);
      done += count;
    }
    return buffer;
  }
};

template <typename Out>
uint32_t quantize_all(const Source& x, Out* out, int64_t n, int64_t start, const Format& f, bool measure,
                      const ChannelSums& wanted, double* sum_x, int64_t* sum_q, uint64_t* checksum) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  std::vector<uint32_t> most(static_cast<size_t>(blocks));
  std::vector<double> sums_x(measure ? static_cast<size_t>(blocks) : 0);
  std::vector<int64_t> sums_q(measure ? static_cast<size_t>(blocks) : 0);
  std::vector<uint64_t> sums_bits(checksum ? static_cast<size_t>(blocks) : 0);
  // Channels are summed by pieces of fixed length, and the pieces in order.
  constexpr int64_t kMostPieces = 64;
  const int64_t piece =
      wanted.out ? std::max({kGrain, (blocks + kMostPieces - 1) / kMostPieces, 8 * wanted.channels / kBlock}) : 1;
  const int64_t pieces = (blocks + piece - 1) / piece;
  std::vector<double> by_piece(wanted.out ? static_cast<size_t>(pieces * wanted.channels) : 0);
  parallel_for(pieces, std::max<int64_t>(1, kGrain / piece), [&](int64_t begin, int64_t end) {
    ChannelAdder channels(wanted);
    float buffer[kBlock];
    for (int64_t b = begin * piece; b < std::min(blocks, end * piece); ++b) {
      const int64_t at = b * kBlock, length = std::min(kBlock, n - at);
      const float* values = x.block(at, length, buffer);
      most[static_cast<size_t>(b)] = quantize_any(values, out + at, length, start + at, f);
      if (measure) {
        sums_x[static_cast<size_t>(b)] = sum_of_magnitudes(values, length);
        sums_q[static_cast<size_t>(b)] = sum_of_integers(out + at, length);
      }
      if (checksum)
        checksum_block(reinterpret_cast<const shared_bits*>(values), length, at, &sums_bits[static_cast<size_t>(b)]);
      if (!wanted.out) continue;
      channels.add(values, length, at);
      if ((b + 1) % piece == 0 || b + 1 == blocks) channels.finish_piece(by_piece.data() + b / piece * wanted.channels);
    }
  });
  *sum_x = 0;
  *sum_q = 0;
  for (double each : sums_x) *sum_x += each;
  for (int64_t each : sums_q) *sum_q += each;
  for (uint64_t each : sums_bits) *checksum += each;
  for (int64_t c = 0; wanted.out && c < wanted.channels; ++c) {
    double total = 0;
    for (int64_t i = 0; i < pieces; ++i) total += by_piece[static_cast<size_t>(i * wanted.channels + c)];
    wanted.out[c] = static_cast<float>(total);
  }
  uint32_t all = 0;
  for (uint32_t each : most) all = std::max(all, each);
  return all;
}

uint32_t absmax_all(const Source& x, int64_t n) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  std::vector<uint32_t> most(static_cast<size_t>(blocks));
  parallel_for(blocks, kGrain, [&](int64_t begin, int64_t end) {
    float buffer[kBlock];
    for (int64_t b = begin; b < end; ++b) {
      const int64_t length = std::min(kBlock, n - b * kBlock);
      most[static_cast<size_t>(b)] = absmax_any(x.block(b * kBlock, length, buffer), length);
    }
  });
  uint32_t all = 0;
  for (uint32_t each : most) all = std::max(all, each);
  return all;
}

}  // namespace
}  // namespace cnmix

using namespace cnmix;

struct CnmixStatistics {
  double absmax;      // NaN where x holds one
  uint64_t checksum;  // as cnmix_checksum, where wanted
  double sum_x;       // of |x|, where measured
  int64_t sum_q;      // of |q|, where measured
  int64_t position;   // the one used
};

namespace {

// What is asked of a tensor, or of each entry of a batch.
struct Request {
  int bits, rounding;
  uint64_t seed, stream;
  bool measure, checksum;
  ChannelSums channels;
};

// With `choose`, the position is the one that fits the largest magnitude.
void quantize_one(const Source& source, void* out, int64_t n, int64_t start, bool choose, int64_t given,
                  const Request& request, CnmixStatistics* statistics) {
  const int bits = request.bits;
  int position = static_cast<int>(given);
  if (choose) {
    const float largest = from_bits(absmax_all(source, n));
    int exponent = 0;
    position = 0;
    if (largest > 0 && std::isfinite(largest)) {
      std::frexp(largest, &exponent);
      position = std::min(std::max(exponent - 1 - (bits - 2), -128), 127);
    }
  }
  const Format f = make_format(bits, position, request.rounding, request.seed, request.stream);
  statistics->checksum = 0;
  const auto quantize_to = [&](auto* to) {
    return quantize_all(source, to, n, start, f, request.measure, request.channels, &statistics->sum_x,
                        &statistics->sum_q, request.checksum ? &statistics->checksum : nullptr);
  };
  const uint32_t most = bits == 8    ? quantize_to(static_cast<int8_t*>(out))
                        : bits == 16 ? quantize_to(static_cast<int16_t*>(out))
                                     : quantize_to(static_cast<int32_t*>(out));
  statistics->absmax = from_bits(most);
  statistics->position = position;
}

}  // namespace

// Quantizes n floats, float32 or (x_bytes 2) bfloat16, into `out`, of the width's integer type. With `choose`, the position
// is the one that fits; the output is undefined where the largest magnitude is not finite. Random numbers are those from the
// element `start` of the stream on. `channel_sums` may be null.
CNMIX_API void cnmix_quantize(const void* x, int x_bytes, void* out, int64_t n, int bits, int choose, int position,
                              int rounding, uint64_t seed, uint64_t stream, int64_t start, int measure, int checksum,
                              int64_t channels, int64_t inner, float* channel_sums, CnmixStatistics* statistics) {
  const Request request{bits, rounding, seed, stream, measure != 0, checksum != 0, {channels, inner, channel_sums}};
  quantize_one({x, x_bytes == 2}, out, n, start, choose != 0, position, request, statistics);
}

// A batch of tensors, as they lie in memory. Mirrored by _FloatBatch in native/structures.py.
struct CnmixFloatBatch {
  const void* data;
  int64_t bytes;          // of one value: 4 float32, 2 bfloat16
  int64_t entries;
  const int64_t* places;  // of each entry, in values from `data`
  int64_t rows, columns;  // of an entry
  int64_t stride;         // values from one row to the next
};

// The same for each entry at a position of its own, given or (null) chosen. The integers lie one behind the other, and
// random numbers go on from one entry to the next.
CNMIX_API void cnmix_quantize_batch(const CnmixFloatBatch* x, void* out, int bits, const int64_t* positions, int rounding,
                                    uint64_t seed, uint64_t stream, int measure, CnmixStatistics* statistics) {
  const Request request{bits, rounding, seed, stream, measure != 0, false, {}};
  const int64_t n = x->rows * x->columns, out_bytes = bits == 8 ? 1 : bits == 16 ? 2 : 4;
  const int64_t columns = x->rows == 1 || x->stride == x->columns ? 0 : x->columns;
  for_entries(x->entries, kGrain * kBlock / std::max<int64_t>(1, n) + 1, [&](int64_t entry) {
    const Source source{static_cast<const char*>(x->data) + x->places[entry] * x->bytes, x->bytes == 2, columns,
                        x->stride};
    quantize_one(source, static_cast<char*>(out) + entry * n * out_bytes, n, entry * n, !positions,
                 positions ? positions[entry] : 0, request, statistics + entry);
  });
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

// What is lost of some values of a tensor. Mirrored by FoundLosses in native/structures.py.
struct CnmixLosses {
  double noise;            // sum of the squares of the differences, in steps
  int64_t underflown;      // values that are not zero, and whose integer is
  int64_t exponents[256];  // how many values have each, as float32 stores them
};

template <typename Integer>
void find_losses(const float* x, const Integer* integers, int64_t n, int64_t distance, double inverse, CnmixLosses* found) {
  for (int64_t i = 0; i < n; i += distance) {
    const double difference = x[i] * inverse - integers[i];
    found->noise += difference * difference;
    found->underflown += x[i] != 0 && integers[i] == 0;
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    ++found->exponents[bits >> 23 & 255];
  }
}

// The losses of every value at this distance; the step of the integers is 1 / `inverse`.
CNMIX_API void cnmix_losses(const float* x, const void* integers, int bytes, int64_t n, int64_t distance, double inverse,
                            CnmixLosses* found) {
  *found = {};
  if (bytes == 1) find_losses(x, static_cast<const int8_t*>(integers), n, distance, inverse, found);
  if (bytes == 2) find_losses(x, static_cast<const int16_t*>(integers), n, distance, inverse, found);
  if (bytes == 4) find_losses(x, static_cast<const int32_t*>(integers), n, distance, inverse, found);
}
