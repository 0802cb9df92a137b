// The ops, each once, for all platforms and fabrics: what its kernels are told, how
// that is read from a call, what a rank lends to its peers, and where it reads theirs.
#ifndef JAX_EP_FFI_BIND_OPS_H_
#define JAX_EP_FFI_BIND_OPS_H_

#include <cstdint>
#include <span>
#include <vector>

#include "bind/call_reader.h"
#include "common/gather_rows.h"
#include "common/peer_table.h"
#include "common/plan.h"
#include "common/plan_arrays.h"
#include "common/reduce_rows.h"
#include "common/row_dots.h"

// Expands X(name, Op) for every op: a fabric's file defines its handlers so.
#define EP_FOR_EACH_OP(X) \
  X(plan, PlanOp)         \
  EP_FOR_EACH_PLANNED_OP(X)

// The same for all that take a plan.
#define EP_FOR_EACH_PLANNED_OP(X)  \
  X(gather_rows, GatherRowsOp)     \
  X(gather_scaled, GatherScaledOp) \
  X(reduce_rows, ReduceRowsOp)     \
  X(reduce_scaled, ReduceScaledOp) \
  X(row_dots, RowDotsOp)

namespace jax_ep {

// A buffer that a rank's peers read. Without rows it is for this process alone.
struct LentRows {
  const void* data;
  std::int64_t num_rows;
  std::int64_t row_bytes;

  std::int64_t bytes() const { return num_rows * row_bytes; }
};

// An Op has
//   Call: what was read of a call, of the first stacked rank, with tables of the
//   stacked
//     ranks' buffers
//   Call Read(CallReader&); of no use once the reader has failed
//   LentBy(const Call&): what that rank lends, the same number of buffers on all ranks
//   SetPeers(Call&, tables): where all ranks' lent buffers are, by buffer
//   kPullsRows: whether of its buffers only the rows are read that the plan gave tokens

using Tables = std::span<const PeerTable>;

PlanSizes ReadSizes(CallReader& reader);

// How many ranks are on a node: at least one.
std::int64_t ReadRanksPerNode(CallReader& reader);

// What plans are made of, the choices of so many ranks; and so many plans, to be filled
// in.
PlanArgs ReadPlanArgs(CallReader& reader, const PlanSizes& sizes, std::int64_t ranks);
PlanArrays ReadPlanResults(CallReader& reader, const PlanSizes& sizes,
                           std::int64_t ranks);

// The call of an op over a plan: its kernel runs once for each payload.
template <typename KernelArgs>
struct PlannedCall {
  PlanArrays plan;
  std::vector<KernelArgs> kernels;
};

struct PlanOp {
  struct Call {
    PlanArgs args;  // without outputs
    PlanArrays own;
    // Whether this rank makes the plans of all that lend it their arrays. All together
    // cost as much as one.
    bool makes_all = true;
  };
  static Call Read(CallReader& reader);
  static std::vector<LentRows> LentBy(const Call& call);
  static void SetPeers(Call& call, Tables tables);
  static constexpr bool kPullsRows = false;
};

struct GatherOp {
  using Call = PlannedCall<GatherRowsArgs>;
  static std::vector<LentRows> LentBy(const Call& call);
  static void SetPeers(Call& call, Tables tables);
  static constexpr bool kPullsRows = false;
};

struct GatherRowsOp : GatherOp {
  static Call Read(CallReader& reader);
};

struct GatherScaledOp : GatherOp {
  static Call Read(CallReader& reader);
};

// What the ops have in common in which each token pulls its choices' rows.
template <typename KernelArgs>
struct PullOp {
  using Call = PlannedCall<KernelArgs>;
  static std::vector<LentRows> LentBy(const Call& call) {
    std::vector<LentRows> lent;
    lent.reserve(call.kernels.size());
    for (const KernelArgs& args : call.kernels) {
      lent.push_back({.data = args.rows[0],
                      .num_rows = args.capacity,
                      .row_bytes = args.hidden * ByteWidth(args.dtype)});
    }
    return lent;
  }
  static void SetPeers(Call& call, Tables tables) {
    for (std::size_t i = 0; i < call.kernels.size(); ++i) {
      call.kernels[i].rows = tables[i];
    }
  }
  static constexpr bool kPullsRows = true;
};

struct ReduceRowsOp : PullOp<ReduceRowsArgs> {
  static Call Read(CallReader& reader);
};

struct ReduceScaledOp : PullOp<ReduceRowsArgs> {
  static Call Read(CallReader& reader);
};

struct RowDotsOp : PullOp<RowDotsArgs> {
  static Call Read(CallReader& reader);
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_BIND_OPS_H_
