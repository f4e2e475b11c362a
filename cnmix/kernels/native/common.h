// What the compiled kernels share: threads, and which instructions this processor has.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(_OPENMP)
#include <omp.h>
#endif

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define CNMIX_X86 1
#include <immintrin.h>
#define CNMIX_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define CNMIX_VNNI __attribute__((target("avx512vnni,avx512f,avx512bw,avx512dq,avx512vl")))
#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
#define CNMIX_HAS_AMX 1
#define CNMIX_AMX __attribute__((target("amx-tile,amx-int8,avx512f,avx512bw,avx512dq,avx512vl")))
#endif
#define CNMIX_AVX2 __attribute__((target("avx2,fma")))
#endif

#define CNMIX_API extern "C" __attribute__((visibility("default")))

// Defines NAME, which calls the loop NAME_body compiled for the instructions of this processor.
#if defined(CNMIX_X86)
#define CNMIX_DISPATCH(NAME, PARAMETERS, ARGUMENTS)                          \
  CNMIX_AVX512 void NAME##_avx512 PARAMETERS { NAME##_body ARGUMENTS; }      \
  CNMIX_AVX2 void NAME##_avx2 PARAMETERS { NAME##_body ARGUMENTS; }          \
  void NAME PARAMETERS {                                                     \
    if (active_isa >= AVX512) return NAME##_avx512 ARGUMENTS;                \
    if (active_isa == AVX2) return NAME##_avx2 ARGUMENTS;                    \
    NAME##_body ARGUMENTS;                                                   \
  }
#else
#define CNMIX_DISPATCH(NAME, PARAMETERS, ARGUMENTS) \
  void NAME PARAMETERS { NAME##_body ARGUMENTS; }
#endif
#define CNMIX_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define CNMIX_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define CNMIX_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace cnmix {

// Integer sums and the floats that replace them share memory.
typedef float __attribute__((may_alias)) shared_float;

// Rounds integer sums to float, scales them and adds the bias, where there is one.
template <typename Sum, typename Float>
CNMIX_INLINE void scale_sums(const Sum* sums, Float* out, int64_t n, float scale, const float* bias) {
  if (bias) {
    CNMIX_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(sums[i]) * scale + bias[i];
  } else {
    CNMIX_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(sums[i]) * scale;
  }
}

enum Isa { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512_VNNI = 3, AMX = 4 };

// The widest instructions that are to be used; cnmix_set_isa lowers it, for tests.
extern Isa active_isa;
Isa detect_isa();

// Threads that may be used: one where the caller is one of several.
inline int max_threads() {
#if defined(_OPENMP)
  return omp_in_parallel() ? 1 : omp_get_max_threads();  // torch.set_num_threads sets it: both load the same libgomp
#else
  return 1;
#endif
}

// Calls body(begin, end) for pieces of [0, count), in parallel where each thread gets at least `grain`.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  const int64_t threads = std::min<int64_t>(max_threads(), count / std::max<int64_t>(grain, 1));
  if (threads <= 1) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    // num_threads asks: OMP_THREAD_LIMIT, OMP_DYNAMIC or an outer region may grant fewer.
    const int64_t granted = omp_get_num_threads();
    const int64_t share = (count + granted - 1) / granted;
    const int64_t begin = share * omp_get_thread_num();
    const int64_t end = std::min(count, begin + share);
    if (begin < end) body(begin, end);
  }
#endif
}

// Calls body(entry) for each entry of a batch: in parallel, each on one thread, where entries are many or a thread should
// have `grain` of them; else one after the other, each with all threads.
template <typename Body>
void for_entries(int64_t count, int64_t grain, const Body& body) {
  const auto loop = [&](int64_t begin, int64_t end) {
    for (int64_t entry = begin; entry < end; ++entry) body(entry);
  };
  if (grain > 1 || count >= 4 * max_threads())
    parallel_for(count, grain, loop);
  else
    loop(0, count);
}

}  // namespace cnmix
