// Asks the CPU which instruction sets it has; the loops are in row_math_isa.cc.

#include "cpu/row_math.h"

namespace jax_ep::cpu {

extern const RowMath kRowMathBaseline;
#if defined(__x86_64__)
extern const RowMath kRowMathAvx2;
#endif

const RowMath& BestRowMath() {
#if defined(__x86_64__)
  static const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2) return kRowMathAvx2;
#endif
  return kRowMathBaseline;
}

}  // namespace jax_ep::cpu
