// The fabric of ranks on the CPU devices of several processes of one host: those of a
// process meet as devices do, and the processes read each other's windows of memory.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "bind/cpu/call_site.h"
#include "bind/cpu/meeting_call.h"
#include "bind/handler_list.h"
#include "bind/ops.h"
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
  reader.List("members");
  reader.Attribute("kind");
  const auto* numbers =
      reader.Operand<std::int32_t>("numbers", reader.where().num_ranks);
  return {.call = Op::Read(reader), .numbers = numbers};
}

// Finds out where a call's rank exchanges with ranks of other processes.
std::shared_ptr<const Span> FindSpan(const Arrival& arrival, CallReader& reader,
                                     std::int32_t told) {
  auto span = arrival.site->SpanOf(arrival.device);
  if (span != nullptr) return span;
  const FirstRun run = DescribeRun(reader, arrival.group, arrival.run.run_id);
  auto made = arrival.site->NewSpan(arrival.device, run, told);
  if (const auto* problem = std::get_if<std::string>(&made)) {
    reader.Fail(*problem);
    return nullptr;
  }
  return std::move(std::get<std::shared_ptr<const Span>>(made));
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
  std::vector<cpu::PublishRowsArgs> publications;
  for (const LentRows& lent : Op::LentBy(pending.call)) {
    cpu::PublishRowsArgs args = {};
    args.from = lent.data;
    args.num_rows = lent.num_rows;
    args.row_bytes = lent.row_bytes;
    args.ranges = {{0, lent.num_rows}};
    if constexpr (Op::kPullsRows) {
      const PlanArrays& plan = pending.call.plan;
      cpu::KeepPulledRows(plan.recv_row, plan.recv_counts, Elsewhere(span),
                          &pending.fault, args);
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
}

// As ExchangeDevices; a group that lies in this process meets as its ranks do there.
template <typename Op>
ffi::Future ExchangeProcesses(CallSite* site, ffi::RunId run, std::int32_t device,
                              ffi::ThreadPool pool, ffi::RemainingArgs operands,
                              ffi::RemainingRets results, ffi::Dictionary attributes) {
  const auto pending = std::make_shared<PendingCall<Op>>();
  ffi::Future future(pending->promise);
  CallReader reader(operands, results, attributes);
  auto [call, numbers] = ReadCall<Op>(reader);
  pending->call = std::move(call);
  NoteFaultsIn(pending->fault, pending->call);
  const Group group = FindGroup(reader, device);
  const Arrival arrival = {.site = site, .run = run, .device = device, .group = group};
  std::shared_ptr<const Span> span;
  if (!reader.failed() && group.Spans(ProcessIndex())) {
    span = FindSpan(arrival, reader, numbers[0]);
  }
  if (reader.failed()) {
    pending->promise.SetError(reader.error());
    return future;
  }
  Attendance attendance = AttendanceOf(pending, reader.where(), arrival);
  attendance.schedule = ScheduleOn(pool);
  if (span != nullptr) SpanProcesses(pending, std::move(span), attendance);
  ProcessMeetingPoint().Attend(attendance);
  return future;
}

}  // namespace
}  // namespace jax_ep

#define EP_DEFINE_PROCESSES(name, Op)                                         \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_##name##_processes,                    \
                                jax_ep::ExchangeProcesses<jax_ep::Op>,        \
                                xla::ffi::Ffi::Bind()                         \
                                    .Ctx<xla::ffi::State<jax_ep::CallSite>>() \
                                    .Ctx<xla::ffi::RunId>()                   \
                                    .Ctx<xla::ffi::DeviceOrdinal>()           \
                                    .Ctx<xla::ffi::ThreadPool>()              \
                                    .RemainingArgs()                          \
                                    .RemainingRets()                          \
                                    .Attrs());                                \
  EP_LIST_HANDLER(name##_processes, jax_ep::ReadCall<jax_ep::Op>,             \
                  {"instantiate", "jax_ep_new_call_site"},                    \
                  {"execute", "jax_ep_" #name "_processes"})

EP_FOR_EACH_OP(EP_DEFINE_PROCESSES)
