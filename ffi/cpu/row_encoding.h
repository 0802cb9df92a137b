// The inner loops that encode rows.

#ifndef JAX_EP_FFI_CPU_ROW_ENCODING_H_
#define JAX_EP_FFI_CPU_ROW_ENCODING_H_

#include <cstdint>

#include "common/encode_rows.h"

namespace jax_ep::cpu {

// Encodes the rows from `begin` on, up to `end`. One for each instruction set, all with
// the same results to the last bit.
using EncodeLoop = void(const EncodeRowsArgs& args, std::int64_t begin,
                        std::int64_t end);

EncodeLoop EncodeBaseline;
#if defined(__x86_64__)
EncodeLoop EncodeAvx2;
#endif

// Returns the best one that this CPU runs.
EncodeLoop* BestEncodeLoop();

}  // namespace jax_ep::cpu

#endif  // JAX_EP_FFI_CPU_ROW_ENCODING_H_
