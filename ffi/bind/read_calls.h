#ifndef JAX_EP_FFI_BIND_READ_CALLS_H_
#define JAX_EP_FFI_BIND_READ_CALLS_H_

#include "bind/call_reader.h"
#include "common/gather_rows.h"
#include "common/plan.h"
#include "common/reduce_rows.h"
#include "common/row_dots.h"

namespace jax_ep {

// These read and check an exchange's operands and results, and return the arguments of
// the first stacked rank, with tables of the stacked ranks' buffers. What they return
// is of no use once the reader has failed.

GatherRowsArgs ReadGatherRows(CallReader& reader);
ReduceRowsArgs ReadReduceRows(CallReader& reader);
RowDotsArgs ReadRowDots(CallReader& reader);

struct PlanCall {
  PlanArgs args;  // without outputs
  PlanOutputs first;
};
PlanCall ReadPlan(CallReader& reader);

}  // namespace jax_ep

#endif  // JAX_EP_FFI_BIND_READ_CALLS_H_
