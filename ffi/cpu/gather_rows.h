// The CPU's kernel of `dispatch` and of the gradient of `combine`, for the handlers.

#ifndef JAX_EP_FFI_CPU_GATHER_ROWS_H_
#define JAX_EP_FFI_CPU_GATHER_ROWS_H_

#include "common/gather_rows.h"
#include "common/work.h"

namespace jax_ep::cpu {

// Returns the work of one rank. `args` is read when it runs and must live until then.
Work GatherRowsWork(const GatherRowsArgs& args);

}  // namespace jax_ep::cpu

#endif  // JAX_EP_FFI_CPU_GATHER_ROWS_H_
