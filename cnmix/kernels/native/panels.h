// Operands of the integer product, packed into the tiles that the processor multiplies.
#pragma once

#include "windows.h"

// An integer matrix (rows, K) as it lies in memory: in lines of contiguous values. Mirrored by _Operand in
// native/__init__.py.
struct CnmixOperand {
  const void* data;
  int64_t by_k;           // 0: a line is one row, K values long; 1: a line is one k, with the values of all rows
  int64_t digits;         // bytes of one value: 1 int8, 2 int16, 4 for 31 bits in int32
  int64_t inner;          // line i starts (i % inner) * stride + (i / inner) * outer values from `data`
  int64_t stride;
  int64_t outer;
  const CnmixWindows* windows;  // where given, the lines are windows gathered from `data` instead
};

namespace cnmix {

constexpr int64_t kTileRows = 16;    // rows of a tile
constexpr int64_t kTileDepth = 64;   // of K
constexpr int64_t kTileBytes = 1024;

inline int64_t panels_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// A panel is sixteen rows of one operand, digit by digit: for each digit, tiles along K. Two arrangements of a tile:
// `ROWS`, sixteen rows of 64 bytes along K; `QUADS`, sixteen lines, each four k of all sixteen rows.
enum Arrangement { ROWS, QUADS };

struct Packing {
  const CnmixOperand* operand;
  int64_t rows;           // of the whole operand
  int64_t k_first, k_count;
  Arrangement arrangement;
  uint8_t flip;           // exclusive-or on each byte: 0x80 makes a signed digit an unsigned one, 128 larger

  // An empty K is one tile of zeros.
  int64_t tiles() const { return std::max<int64_t>(1, (k_count + kTileDepth - 1) / kTileDepth); }
  int64_t panel_bytes() const { return operand->digits * tiles() * kTileBytes; }
};

// Packs panels [first, last) of rows; those beyond the operand's rows are zeros, and so is K beyond its end.
void pack_panels(const Packing& job, int64_t first, int64_t last, uint8_t* out);

// The same in parallel.
void pack_all(const Packing& job, int64_t first, int64_t last, uint8_t* out);

}  // namespace cnmix
