// What one rank does of the ops by itself, between the collectives of rounds: all that
// is read and written is on its device.
#ifndef JAX_EP_FFI_BIND_LOCAL_OPS_H_
#define JAX_EP_FFI_BIND_LOCAL_OPS_H_

#include <cstdint>
#include <vector>

#include "bind/call_reader.h"
#include "bind/ops.h"
#include "common/gather_rows.h"
#include "common/plan.h"
#include "common/plan_arrays.h"
#include "common/reduce_rows.h"
#include "common/row_dots.h"

// Expands X(name, Op) for every op that takes a plan.
#define EP_FOR_EACH_LOCAL_OP(X)         \
  X(gather_rows, LocalGatherRowsOp)     \
  X(gather_scaled, LocalGatherScaledOp) \
  X(reduce_rows, LocalReduceRowsOp)     \
  X(reduce_scaled, LocalReduceScaledOp) \
  X(row_dots, LocalRowDotsOp)

namespace jax_ep {

// Local ops are told of a plan where some tokens' choices have their rows. Tokens and
// rows may come in pieces of equal size, each a buffer of its own: then there are as
// many kernels as pieces of tokens. Rows are pieces of one array; or, if sums are made
// of them, there is a piece of each rank, this rank's first, then the next one's. What
// comes from the wire or goes there may be called integers of as many bytes as it has.

// One rank's plan, to be made of the choices of all.
struct LocalPlanOp {
  struct Call {
    PlanArgs args;  // without outputs
    PlanArrays own;
    const std::int32_t* rank;
  };
  static Call Read(CallReader& reader);
};

// Rows that no choice names stay as they are in `onto`, which is the result's buffer;
// if that is empty, they hold anything.
struct LocalGather {
  struct Call : PlannedCall<GatherRowsArgs> {
    std::vector<void*> pieces;  // of rows, to which the kernels point
  };
  static Call Read(CallReader& reader, bool scaled);
};

struct LocalGatherRowsOp : LocalGather {
  static Call Read(CallReader& reader) { return LocalGather::Read(reader, false); }
};

struct LocalGatherScaledOp : LocalGather {
  static Call Read(CallReader& reader) { return LocalGather::Read(reader, true); }
};

struct LocalReduce {
  struct Call : PlannedCall<ReduceRowsArgs> {
    std::vector<const void*> pieces;  // of rows
  };
  static Call Read(CallReader& reader, bool scaled);
};

struct LocalReduceRowsOp : LocalReduce {
  static Call Read(CallReader& reader) { return LocalReduce::Read(reader, false); }
};

struct LocalReduceScaledOp : LocalReduce {
  static Call Read(CallReader& reader) { return LocalReduce::Read(reader, true); }
};

struct LocalRowDotsOp {
  using Call = PlannedCall<RowDotsArgs>;
  static Call Read(CallReader& reader);
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_BIND_LOCAL_OPS_H_
