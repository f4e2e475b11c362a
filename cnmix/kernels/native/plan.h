// A fixed list of steps over prepared memory, run in one call; see plan.cpp.
#pragma once

#include "panels.h"
#include "scratch.h"

// Where a value lies: bytes from an address that is given at each run. Mirrored by Place in native/structures.py, as the
// other structures here are.
struct CnmixPlace {
  int64_t base, offset;
};

// One float32 operation on every element, or a place where the elements go.
struct CnmixStage {
  int64_t kind;
  const float* values;    // of each channel, sixteen more than there are
  const float* terms;     // likewise, of a MULTIPLY_ADD
  float number, other;
  CnmixPlace place;
  int64_t stride;         // elements from one row of the value to the next
};

// How a product is cut into tasks: by rows (for lines, in images), groups and shares of the columns, the last one fastest.
struct CnmixLayout {
  int64_t threads;        // for so many; 0 where there is none yet
  int64_t panels;         // of columns, of a group
  int64_t shares;
  int64_t row_tasks;
  int64_t rows_each;      // row panels, or lines of an image
  // Of lines: their tasks in an image; pixels of a prepared line and positions between the starts of two of them; lines
  // of the input that are a multiple of the stride apart lie together.
  int64_t tasks_of_image, width, pitch, lines_together;
};

struct CnmixStep {
  int64_t kind;
  CnmixPlace source, target;
  CnmixWindows windows;   // of products, pools and enlarged images; `run` bytes of one group's pixel, `pixel` of the whole
  int64_t rows, channels; // of what the step makes
  int64_t bytes;          // of one element of the source
  int64_t groups, arrangement;
  int64_t tiles;          // of packed K; quads of taps where depthwise
  const uint8_t* weights;
  const int32_t* corrections;  // of each column, what 128 more in every element of a row adds, negative
  const CnmixStage* stages;
  int64_t stage_count;
  int64_t source_stride, target_stride;  // bytes from row to row, of copies
  CnmixLayout layout;     // of a product; the first run makes it
};

struct CnmixPlan {
  CnmixStep* steps;
  int64_t count;
};

// The tensors of a run: the addresses that places count from, how many bytes further they are in the next turn, and
// whether they lie channel by channel. A batch takes a turn for each part that the plan was made for.
struct CnmixRun {
  uint8_t* const* bases;
  const int64_t *strides, *planes;
  int64_t turns;
  double* seconds;        // gets the time of each step added, where given
};

namespace cnmix {

enum StepKind { PRODUCT = 0, DEPTHWISE = 1, ELEMENTS = 2, MAX_POOL = 3, COPY = 4, ENLARGE = 5 };

// How a product meets its rows: as they lie in the source; lines of the image with zeros around them, of which the taps of
// one line are one run of K; windows gathered one by one; or windows copied from such lines. Tiles of rows that do not
// begin at half a line of the cache load so slowly that they are copied.
enum RowArrangement { LYING_ROWS = 0, IMAGE_LINES = 1, GATHERED_WINDOWS = 2, LINE_WINDOWS = 3 };
constexpr int64_t kQuickStart = 32;  // bytes

enum StageKind {
  MULTIPLY = 0,
  MULTIPLY_NUMBER = 1,
  ADD = 2,
  ADD_VALUE = 3,
  RELU = 4,
  LEAKY_RELU = 5,
  CLAMP = 6,
  STORE = 7,
  QUANTIZE_BYTES = 8,
  QUANTIZE_WORDS = 9,
  QUANTIZE_BOUNDED = 10,  // to bytes, of elements that are finite and fit int32 when scaled; `other` 1: no negative ones
  MULTIPLY_ADD = 11,      // rounded once
};

// A stage with its address in this run.
struct Stage {
  int64_t kind;
  const float *values, *terms;
  float number, other;
  uint8_t* memory;
  int64_t stride;
};

constexpr int64_t kMostStages = 32;

struct Chain {
  Stage stages[kMostStages];
  int64_t count;
};

// One step of a run, with its addresses.
struct Job {
  const CnmixStep* step;
  uint8_t *source, *target;
  bool planes;            // the source lies channel by channel
  Chain chain;
};

// What a thread has while it runs a plan.
struct Worker {
  int64_t thread = 0, threads = 1;
  bool vnni = false;      // else tiles
  alignas(64) float bad[16] = {};  // NaN where a quantized element was not finite
  bool failed = false;    // no memory
  // Which rows of which step lie prepared in its memory.
  const CnmixStep* prepared_step = nullptr;
  int64_t prepared_rows = -1;
};

// How many tasks a step has, and one of them.
void lay_out_product(CnmixStep& step, int64_t threads);
int64_t product_tasks(const CnmixStep& step);
void run_product(const Job& job, int64_t task, Worker& worker);
int64_t depthwise_tasks(const CnmixStep& step);
void run_depthwise(const Job& job, int64_t task, Worker& worker);
int64_t elements_tasks(const CnmixStep& step);
void run_elements(const Job& job, int64_t task, Worker& worker);
int64_t pool_tasks(const CnmixStep& step);
void run_pool(const Job& job, int64_t task);
int64_t copy_tasks(const CnmixStep& step);
void run_copy(const Job& job, int64_t task);
void run_enlarge(const Job& job, int64_t task);

}  // namespace cnmix
