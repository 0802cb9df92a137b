// The fabric of ranks anywhere, whose rows XLA's collectives carry in rounds: what one
// rank does between them, on one CPU device. Nobody waits here.
#include <cstddef>
#include <cstdint>
#include <vector>

#include "bind/cpu/works.h"
#include "bind/handler_list.h"
#include "bind/ops.h"
#include "cpu/plan.h"

namespace jax_ep {
namespace {

template <typename KernelArgs>
ffi::Error Run(PlannedCall<KernelArgs>& call, const Whereabouts& where,
               ffi::ThreadPool& pool) {
  cpu::PlanFault fault;
  NoteFaultsIn(fault, call);
  RunTogether(WorksOf(call), ScheduleOn(pool));
  if (fault.what() != nullptr) return BadPlan(where.call, fault);
  return ffi::Error::Success();
}

ffi::Error Run(LocalPlanOp::Call& call, const Whereabouts& where, ffi::ThreadPool&) {
  std::vector<const void*> outputs(static_cast<std::size_t>(where.num_ranks), nullptr);
  const auto rank = static_cast<std::size_t>(*call.rank);
  if (rank >= outputs.size()) {
    return ffi::Error::InvalidArgument("jax_ep: needs a rank in [0, num_ranks)");
  }
  outputs[rank] = &call.own;
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
  return Run(call, reader.where(), pool);
}

}  // namespace
}  // namespace jax_ep

#define EP_DEFINE_ROUNDS(name, Op)                              \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_##name##_rounds,         \
                                jax_ep::RunLocally<jax_ep::Op>, \
                                xla::ffi::Ffi::Bind()           \
                                    .Ctx<xla::ffi::ThreadPool>()\
                                    .RemainingArgs()            \
                                    .RemainingRets()            \
                                    .Attrs());                  \
  EP_LIST_HANDLER(name##_rounds, jax_ep::Op::Read,              \
                  {"execute", "jax_ep_" #name "_rounds"})

EP_DEFINE_ROUNDS(plan, LocalPlanOp)
EP_FOR_EACH_LOCAL_OP(EP_DEFINE_ROUNDS)
