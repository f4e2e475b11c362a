// The integer matrix product with its rounding.
#pragma once

#include "panels.h"

// Mirrored by Product in native/__init__.py.
struct CnmixProduct {
  int64_t m, n, k;
  CnmixOperand a, b;      // rows: m of a, n of b
  float scale;            // a power of two
  const float* bias;      // n floats, or null
  void* out;              // float32, or bfloat16
  int64_t out_bytes;      // of one value: 4 or 2
  int64_t row_stride;     // values from one row of the output to the next, where positions is 0
  int64_t positions;      // else rows are the positions of images: out[row / positions][column][row % positions]
  int64_t image_stride;   // values from one image to the next
};

namespace cnmix {

constexpr int64_t kOperationsPerThread = 1 << 19;

// Returns whether there was memory for it.
bool multiply(const CnmixProduct& job);

}  // namespace cnmix
