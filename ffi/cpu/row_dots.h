// The CPU's kernel of the gradient of `combine` in its weights, for the handlers.

#ifndef JAX_EP_FFI_CPU_ROW_DOTS_H_
#define JAX_EP_FFI_CPU_ROW_DOTS_H_

#include "common/row_dots.h"
#include "common/work.h"

namespace jax_ep::cpu {

// Returns the work of one rank. `args` is read when it runs and must live until then.
Work RowDotsWork(const RowDotsArgs& args);

}  // namespace jax_ep::cpu

#endif  // JAX_EP_FFI_CPU_ROW_DOTS_H_
