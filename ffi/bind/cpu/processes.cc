// The fabric of ranks on the CPU devices of several processes of one host: those of a
// process meet as devices do, and the processes read each other's windows of memory.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "bind/cpu/first_run.h"
#include "bind/cpu/meeting_call.h"
#include "bind/ops.h"
#include "bind/process/call_site.h"
#include "bind/process/process.h"
#include "cpu/publish_rows.h"
#include "fabric/threads/meeting.h"

namespace jax_ep {
namespace {

template <typename Op>
struct SpanningCall {
  typename Op::Call call;
  const std::int32_t* numbers;  // [num_ranks], what the roll call has told
};

template <typename Op>
SpanningCall<Op> ReadCall(CallReader& reader) {
  const auto* numbers =
      reader.Operand<std::int32_t>("numbers", reader.where().num_ranks);
  return {.call = Op::Read(reader), .numbers = numbers};
}

// All that is read of a call: the members by FindGroup, the kind on its first run.
template <typename Op>
void Ask(CallReader& reader) {
  reader.List("members");
  reader.Attribute("kind");
  ReadCall<Op>(reader);
}

// The call that the ranks have agreed on, as the roll call has told.
std::optional<AgreedCall> AgreedOn(const FirstRun& run, std::int32_t told) {
  if (told < 0) return ProcessFirstRuns().Find(run.group, -2 - told);
  const AgreedCall agreed = {.number = told, .first_run = run.run_id};
  ProcessFirstRuns().Remember(run, agreed);
  return agreed;
}

// Finds out where a call's rank exchanges with ranks of other processes.
std::shared_ptr<const Span> FindSpan(const Arrival& arrival, CallReader& reader,
                                     std::int32_t told) {
  return arrival.site->SpanOf(arrival.device, [&]() -> std::shared_ptr<const Span> {
    const FirstRun run = DescribeRun(reader, arrival.group, arrival.run.run_id);
    const std::optional<AgreedCall> agreed = AgreedOn(run, told);
    if (!agreed) {
      reader.Fail(
          "the program's first run failed before its ranks had agreed on this call: "
          "compile it anew");
      return nullptr;
    }
    return std::make_shared<const Span>(
        Span{.process_of = run.process_of,
             .here = ProcessIndex(),
             .site = agreed->number,
             .first_run = agreed->first_run,
             .relay = ProcessHost()->ChannelOf(run.process_of, run.group),
             .group = run.group});
  });
}

std::vector<bool> Elsewhere(const Span& span) {
  std::vector<bool> is_elsewhere;
  is_elsewhere.reserve(span.process_of.size());
  for (const std::int32_t process : span.process_of) {
    is_elsewhere.push_back(process != span.here);
  }
  return is_elsewhere;
}

// What other processes are to find of each buffer that a rank lends: all of it, or the
// rows that ranks elsewhere pull, as each is pulled by one token's rank.
template <typename Op>
std::vector<cpu::PublishRowsArgs> PublicationsOf(PendingCall<Op>& pending,
                                                 const Span& span) {
  const std::vector<bool> is_elsewhere = Elsewhere(span);
  std::vector<cpu::PublishRowsArgs> publications;
  for (const LentRows& lent : Op::LentBy(pending.call)) {
    cpu::PublishRowsArgs args = {};
    args.from = lent.data;
    args.num_rows = lent.num_rows;
    args.row_bytes = lent.row_bytes;
    args.ranges = {{0, lent.num_rows}};
    if constexpr (Op::kPullsRows) {
      const PlanArrays& plan = pending.call.plan;
      cpu::KeepPulledRows(plan.recv_row, plan.recv_counts, is_elsewhere, &pending.fault,
                          args);
    }
    publications.push_back(std::move(args));
  }
  return publications;
}

// Has a rank publish what it lends, and says who makes the plans of this process.
template <typename Op>
void SpanProcesses(const std::shared_ptr<PendingCall<Op>>& pending,
                   std::shared_ptr<const Span> span, Attendance& attendance) {
  std::int32_t first_here = 0;
  while (!span->IsHere(first_here)) ++first_here;
  SetMakesAll(pending->call, attendance.rank == first_here);
  const auto publications = std::make_shared<std::vector<cpu::PublishRowsArgs>>(
      PublicationsOf(*pending, *span));
  attendance.make_publication = [publications](const std::vector<void*>& places) {
    std::vector<Work> works;
    for (std::size_t i = 0; i < places.size(); ++i) {
      if (places[i] == nullptr) continue;
      (*publications)[i].to = places[i];
      works.push_back(cpu::PublishRowsWork((*publications)[i]));
    }
    return works;
  };
  attendance.span = std::move(span);
  attendance.fabric = "processes";
}

// A group that lies in this process meets as its ranks do on the fabric of devices.
template <typename Op>
ffi::Future ExchangeProcesses(CallSite* site, ffi::RunId run, std::int32_t device,
                              ffi::ThreadPool pool, ffi::RemainingArgs operands,
                              ffi::RemainingRets results, ffi::Dictionary attributes) {
  const auto pending = std::make_shared<PendingCall<Op>>();
  ffi::Future future(pending->promise);
  CallReader reader(operands, results, attributes);
  SpanningCall<Op> spanning = ReadCall<Op>(reader);
  pending->call = std::move(spanning.call);
  Meet(pending, reader, {.site = site, .run = run, .device = device}, pool,
       [&](const Arrival& arrival, Attendance& attendance) {
         if (!arrival.group.Spans(ProcessIndex())) return;
         auto span = FindSpan(arrival, reader, spanning.numbers[0]);
         if (span != nullptr) SpanProcesses(pending, std::move(span), attendance);
       });
  return future;
}

}  // namespace
}  // namespace jax_ep

#define EP_DEFINE_PROCESSES(name, Op)                                               \
  EP_DEFINE_MEETING_HANDLER(name, processes, jax_ep::ExchangeProcesses<jax_ep::Op>, \
                            jax_ep::Ask<jax_ep::Op>)

EP_FOR_EACH_OP(EP_DEFINE_PROCESSES)
