// Implements has_avx2.h: by cpuid itself, as not every compiler's own library has what
// __builtin_cpu_supports reads.

#include "cpu/has_avx2.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace jax_ep::cpu {
namespace {

#if defined(__x86_64__)

struct Registers {
  unsigned eax, ebx, ecx, edx;
};

// All zeros where the CPU has no such leaf.
Registers Ask(unsigned leaf) {
  Registers told{};
  __get_cpuid_count(leaf, 0, &told.eax, &told.ebx, &told.ecx, &told.edx);
  return told;
}

bool SystemSavesVectors() {
  constexpr unsigned kXmmAndYmm = 6;
  unsigned low;
  unsigned high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & kXmmAndYmm) == kXmmAndYmm;
}

bool Look() {
  constexpr unsigned kFmaAndXgetbv = bit_FMA | bit_OSXSAVE;
  return (Ask(1).ecx & kFmaAndXgetbv) == kFmaAndXgetbv && SystemSavesVectors() &&
         (Ask(7).ebx & bit_AVX2) != 0;
}

#else

bool Look() { return false; }

#endif

}  // namespace

bool HasAvx2() {
  static const bool has_it = Look();
  return has_it;
}

}  // namespace jax_ep::cpu
