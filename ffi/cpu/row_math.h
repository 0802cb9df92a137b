// The inner loops that the CPU's kernels share.

#ifndef JAX_EP_FFI_CPU_ROW_MATH_H_
#define JAX_EP_FFI_CPU_ROW_MATH_H_

#include <cstdint>

#include "common/dtype.h"

namespace jax_ep::cpu {

// One summand of a token's result.
struct ReduceTerm {
  const void* row;  // [hidden]
  float weight;
  std::int32_t rank;  // whose row it is; terms come in ascending rank
  std::int32_t node;  // where that rank is
};

// Arithmetic on whole rows. One table per instruction set, all with the same results to
// the last bit.
struct RowMath {
  const char* instruction_set;

  // Copies `bytes` from src to each of `count` destinations. `stream`: with stores that
  // leave the caches alone, to be followed by Fence before another thread reads.
  void (*copy)(const void* src, void* const* dst, std::int64_t count,
               std::int64_t bytes, bool stream);
  void (*fence)();

  // Starts to bring `bytes` from src into the cache: rows lie anywhere, so the CPU does
  // not foresee which comes next.
  void (*prefetch)(const void* src, std::int64_t bytes);

  // dst = weight * src, rounded once.
  void (*scale)(DType dtype, const void* src, float weight, void* dst,
                std::int64_t hidden);

  // out = sum over nodes of round(sum over its ranks of round(sum of weight * row)),
  // rounded: as common/reduce_rows.h says. While each term is added, the row of the
  // next is fetched: after the last, `row_after`, if any.
  void (*reduce)(DType dtype, const ReduceTerm* terms, std::int64_t num_terms,
                 void* out, std::int64_t hidden, const void* row_after);

  // Sum of a * b: 64 lanes that each take every 64th product by fma, then halves added.
  float (*dot)(DType dtype, const void* a, const void* b, std::int64_t hidden);
};

// Returns the best table that this CPU runs.
const RowMath& BestRowMath();

}  // namespace jax_ep::cpu

#endif  // JAX_EP_FFI_CPU_ROW_MATH_H_
