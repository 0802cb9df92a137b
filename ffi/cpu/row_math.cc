// Chooses by which instruction sets the CPU has; the loops are in row_math_isa.cc.

#include "cpu/row_math.h"

#include "cpu/has_avx2.h"

namespace jax_ep::cpu {

extern const RowMath kRowMathBaseline;
#if defined(__x86_64__)
extern const RowMath kRowMathAvx2;
#endif

const RowMath& BestRowMath() {
#if defined(__x86_64__)
  if (HasAvx2()) return kRowMathAvx2;
#endif
  return kRowMathBaseline;
}

}  // namespace jax_ep::cpu
