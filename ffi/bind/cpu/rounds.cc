// The fabric of ranks anywhere, whose rows XLA's collectives carry in rounds: what one
// rank does between them, on one CPU device. Nobody waits here.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "bind/cpu/works.h"
#include "bind/handler_list.h"
#include "bind/local_ops.h"
#include "cpu/plan_fault.h"
#include "fabric/threads/report.h"
#include "fabric/work/work_share.h"

namespace jax_ep {
namespace {

bool HasRank(const Whereabouts& where) {
  return *where.rank >= 0 && *where.rank < where.num_ranks;
}

bool NeedsRank(const LocalPlanOp::Call&) { return true; }
bool NeedsRank(const LocalReduce::Call& call) { return call.pieces.size() > 1; }
template <typename KernelArgs>
bool NeedsRank(const PlannedCall<KernelArgs>&) {
  return false;
}

// Says what is wrong with a plan, where an error would be worse: this rank would not
// come to the collectives that follow, where the others would wait until XLA aborts
// them. As on a GPU, what belongs to a number that is no index is left out.
void ReportOnce(const std::string& what) {
  static std::mutex mutex;
  static auto* said = new std::set<std::string>();
  const std::scoped_lock lock(mutex);
  if (said->insert(what).second) Report(what);
}

// Where each rank's piece of the rows is that sums are made of, if there is one of
// each.
void FindPieces(LocalReduce::Call& call, const Whereabouts& where) {
  if (call.pieces.size() == 1) return;
  std::ranges::rotate(call.pieces, call.pieces.end() - *where.rank);
  for (ReduceRowsArgs& args : call.kernels) args.rows = PeerTable(call.pieces.data());
}
void FindPieces(PlannedCall<GatherRowsArgs>&, const Whereabouts&) {}
void FindPieces(PlannedCall<RowDotsArgs>&, const Whereabouts&) {}

template <typename Call>
ffi::Error Run(Call& call, const Whereabouts& where, ffi::ThreadPool& pool) {
  cpu::PlanFault fault;
  FindPieces(call, where);
  NoteFaultsIn(fault, call);
  RunTogether(WorksOf(call), ScheduleOn(pool));
  if (fault.what() != nullptr) ReportOnce(SaysOf(where.call, fault));
  return ffi::Error::Success();
}

ffi::Error Run(LocalPlanOp::Call& call, const Whereabouts& where, ffi::ThreadPool&) {
  std::vector<const void*> outputs(static_cast<std::size_t>(where.num_ranks), nullptr);
  outputs[static_cast<std::size_t>(*call.rank)] = &call.own;
  call.args.outputs = PeerTable(outputs.data());
  MakePlans(call.args);
  return ffi::Error::Success();
}

template <typename Op>
ffi::Error RunLocally(ffi::ThreadPool pool, ffi::RemainingArgs operands,
                      ffi::RemainingRets results, ffi::Dictionary attributes) {
  CallReader reader(operands, results, attributes);
  auto call = Op::Read(reader);
  if (reader.failed()) return reader.error();
  if (NeedsRank(call) && !HasRank(reader.where())) {
    return ffi::Error::InvalidArgument("jax_ep: needs a rank in [0, num_ranks)");
  }
  return Run(call, reader.where(), pool);
}

}  // namespace
}  // namespace jax_ep

#define EP_DEFINE_ROUNDS(name, Op)                               \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_##name##_rounds,          \
                                jax_ep::RunLocally<jax_ep::Op>,  \
                                xla::ffi::Ffi::Bind()            \
                                    .Ctx<xla::ffi::ThreadPool>() \
                                    .RemainingArgs()             \
                                    .RemainingRets()             \
                                    .Attrs());                   \
  EP_LIST_HANDLER(name##_rounds, jax_ep::Op::Read,               \
                  {"execute", "jax_ep_" #name "_rounds"})

EP_DEFINE_ROUNDS(plan, LocalPlanOp)
EP_FOR_EACH_LOCAL_OP(EP_DEFINE_ROUNDS)
