// Integer matrix products of a batch, in one call: those of attention are many and small.

#include <atomic>

#include "product.h"

// Mirrored by ProductBatch in native/__init__.py.
struct CnmixProductBatch {
  CnmixProduct first;       // of the entry whose matrices lie at the beginning of the data
  int64_t entries;
  const int64_t* a_places;  // of each entry's matrix, in values from the data of `first.a`
  const int64_t* b_places;
  const float* scales;      // of each entry, or null: that of `first`
};

using namespace cnmix;

namespace {

const void* advance(const CnmixOperand& operand, int64_t values) {
  return static_cast<const char*>(operand.data) + values * operand.digits;
}

}  // namespace

// The results lie one behind the other. Returns 1, or 0 where memory was missing.
CNMIX_API int cnmix_multiply_batch(const CnmixProductBatch* batch) {
  const CnmixProduct& first = batch->first;
  const int64_t operations = first.m * first.n * std::max<int64_t>(1, first.k) * first.a.digits * first.b.digits;
  std::atomic<bool> done{true};
  for_entries(batch->entries, kOperationsPerThread / std::max<int64_t>(1, operations) + 1, [&](int64_t entry) {
    CnmixProduct job = first;
    job.a.data = advance(first.a, batch->a_places[entry]);
    job.b.data = advance(first.b, batch->b_places[entry]);
    job.out = static_cast<char*>(first.out) + entry * first.m * first.n * first.out_bytes;
    if (batch->scales) job.scale = batch->scales[entry];
    if (!multiply(job)) done = false;
  });
  return done;
}
