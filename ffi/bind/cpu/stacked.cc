// The fabric of ranks that are all on one CPU device, stacked along a leading axis:
// their buffers lie one after the other, and nobody waits.
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "bind/cpu/works.h"
#include "bind/handler_list.h"
#include "bind/ops.h"
#include "cpu/plan.h"
#include "fabric/threads/recorder.h"
#include "fabric/threads/recording.h"

namespace jax_ep {
namespace {

// The calls of all ranks, given the first one's.
template <typename KernelArgs>
PlannedCall<KernelArgs> OfAllRanks(const PlannedCall<KernelArgs>& first,
                                   std::int64_t num_stacked) {
  PlannedCall<KernelArgs> all = {.plan = first.plan, .kernels = {}};
  all.kernels.reserve(first.kernels.size() * static_cast<std::size_t>(num_stacked));
  for (std::int64_t i = 0; i < num_stacked; ++i) {
    for (const KernelArgs& args : first.kernels) {
      all.kernels.push_back(args.OfStacked(i));
    }
  }
  return all;
}

template <typename KernelArgs>
ffi::Error Run(PlannedCall<KernelArgs>& first, const Whereabouts& where,
               ffi::ThreadPool& pool) {
  cpu::PlanFault fault;
  NoteFaultsIn(fault, first);
  const PlannedCall<KernelArgs> all = OfAllRanks(first, where.num_stacked);
  RunTogether(WorksOf(all), ScheduleOn(pool));
  if (fault.what() != nullptr) return BadPlan(where.call, fault);
  return ffi::Error::Success();
}

// Many stacked ranks are worth several threads.
ffi::Error Run(PlanOp::Call& call, const Whereabouts& where, ffi::ThreadPool& pool) {
  std::vector<PlanArrays> outputs;
  outputs.reserve(static_cast<std::size_t>(where.num_ranks));
  for (std::int64_t i = 0; i < where.num_ranks; ++i) {
    outputs.push_back(call.args.OfStacked(call.own, i));
  }
  call.args.outputs = PeerTable(outputs.data(), sizeof(PlanArrays));
  using Body = std::function<void(std::int64_t)>;
  cpu::RunPlan(call.args, [&](std::int64_t count, const Body& body) {
    const auto run = [](const void* opaque, std::int64_t i) {
      (*static_cast<const Body*>(opaque))(i);
    };
    RunTogether({{.args = &body, .run = run, .num_chunks = count}}, ScheduleOn(pool));
  });
  return ffi::Error::Success();
}

// Begins to record a call, if calls are: all of its ranks come at once.
std::unique_ptr<Recording> BeginRecording(CallReader& reader) {
  if (!RecordsCalls()) return nullptr;
  Attendance all = {};
  all.print.op = reader.where().call;
  all.num_ranks = static_cast<std::int32_t>(reader.where().num_stacked);
  all.scope = reader.Scope();
  all.fabric = "stacked";
  auto recording = std::make_unique<Recording>(all, 1);
  const std::int64_t now = SteadyNow();
  for (std::int32_t rank = 0; rank < all.num_ranks; ++rank) {
    recording->NoteArrival(rank, now);
  }
  recording->NoteBeginning();
  return recording;
}

template <typename Op>
ffi::Error ExchangeStacked(ffi::ThreadPool pool, ffi::RemainingArgs operands,
                           ffi::RemainingRets results, ffi::Dictionary attributes) {
  CallReader reader(operands, results, attributes);
  typename Op::Call call = Op::Read(reader);
  if (reader.failed()) return reader.error();
  const auto recording = BeginRecording(reader);
  const ffi::Error error = Run(call, reader.where(), pool);
  if (recording != nullptr) {
    recording->NoteEnd();
    recording->NoteTold(error.failure());
  }
  return error;
}

}  // namespace
}  // namespace jax_ep

#define EP_DEFINE_STACKED(name, Op)                                  \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_##name##_stacked,             \
                                jax_ep::ExchangeStacked<jax_ep::Op>, \
                                xla::ffi::Ffi::Bind()                \
                                    .Ctx<xla::ffi::ThreadPool>()     \
                                    .RemainingArgs()                 \
                                    .RemainingRets()                 \
                                    .Attrs());                       \
  EP_LIST_HANDLER(name##_stacked, jax_ep::Op::Read,                  \
                  {"execute", "jax_ep_" #name "_stacked"})

EP_FOR_EACH_OP(EP_DEFINE_STACKED)
