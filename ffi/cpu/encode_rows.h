// The CPU's kernel that encodes rows, for the handlers.

#ifndef JAX_EP_FFI_CPU_ENCODE_ROWS_H_
#define JAX_EP_FFI_CPU_ENCODE_ROWS_H_

#include "common/encode_rows.h"
#include "common/work.h"

namespace jax_ep::cpu {

// Returns the work. `args` is read when it runs and must live until then.
Work EncodeRowsWork(const EncodeRowsArgs& args);

}  // namespace jax_ep::cpu

#endif  // JAX_EP_FFI_CPU_ENCODE_ROWS_H_
