// Which instructions serve on this processor.

#include "common.h"

#if defined(CNMIX_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace cnmix {

#if defined(CNMIX_X86)
namespace {

// Whether the system saves tile registers and lets this process use them.
bool tiles_permitted() {
#if defined(CNMIX_HAS_AMX) && defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch/x86/include/uapi/asm/prctl.h
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace
#endif

Isa detect_isa() {
#if defined(CNMIX_X86)
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (wide && __builtin_cpu_supports("avx512vnni")) {
    constexpr unsigned kTilesAndInt8 = 3u << 24;
    const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTilesAndInt8) == kTilesAndInt8;
    return tiles && tiles_permitted() ? AMX : AVX512_VNNI;
  }
  if (wide) return AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
  return PORTABLE;
}

Isa active_isa = detect_isa();

}  // namespace cnmix

using namespace cnmix;

// Changes whenever a function or a structure does, so that a library of another version is not called.
CNMIX_API int cnmix_abi() { return 13; }

// The instructions in use: 0 portable, 1 AVX2, 2 AVX-512, 3 with VNNI, 4 with AMX. A negative argument only asks; others lower it, for tests.
CNMIX_API int cnmix_isa(int limit) {
  if (limit >= 0) active_isa = static_cast<Isa>(std::min<int>(limit, detect_isa()));
  return active_isa;
}

CNMIX_API int cnmix_threads() { return max_threads(); }
