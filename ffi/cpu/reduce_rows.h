// The CPU's kernel of `combine` and of the gradient of `dispatch`, for the handlers.

#ifndef JAX_EP_FFI_CPU_REDUCE_ROWS_H_
#define JAX_EP_FFI_CPU_REDUCE_ROWS_H_

#include "common/reduce_rows.h"
#include "common/work.h"

namespace jax_ep::cpu {

// Returns the work of one rank. `args` is read when it runs and must live until then.
Work ReduceRowsWork(const ReduceRowsArgs& args);

}  // namespace jax_ep::cpu

#endif  // JAX_EP_FFI_CPU_REDUCE_ROWS_H_
