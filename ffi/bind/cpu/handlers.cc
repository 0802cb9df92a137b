#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "bind/cpu/exchange.h"
#include "bind/read_calls.h"
#include "cpu/gather_rows.h"
#include "cpu/plan.h"
#include "cpu/publish_rows.h"
#include "cpu/reduce_rows.h"
#include "cpu/row_dots.h"
#include "fabric/threads/meeting.h"
#include "fabric/work/work_share.h"

namespace jax_ep {
namespace {

PublishRowsArgs PublishAll(const void* from, std::int64_t num_rows,
                           std::int64_t row_bytes) {
  PublishRowsArgs args = {};
  args.from = from;
  args.num_rows = num_rows;
  args.row_bytes = row_bytes;
  args.ranges = {{0, num_rows}};
  return args;
}

struct GatherRowsOp {
  using Args = GatherRowsArgs;
  static Args Read(CallReader& reader) { return ReadGatherRows(reader); }
  static Work MakeWork(const Args& args) { return GatherRowsWork(args); }
  static Lent LentBy(const Args& args) {
    return {args.x[0], args.scaled ? args.weights[0] : nullptr};
  }
  static void SetPeers(Args& args, const PeerTables& tables) {
    args.x = PeerTable(tables[0]);
    args.weights = PeerTable(tables[1]);
  }
  static constexpr bool kPullsRows = false;
  static Dims DimsOf(const Args& args) { return {args.num_tokens, args.row_bytes}; }
  static PublishRowsArgs PublicationOf(const Args& args, const SpanningCall&,
                                       const Span&) {
    PublishRowsArgs whole = PublishAll(args.x[0], args.num_tokens, args.row_bytes);
    if (args.scaled) {
      whole.whole_from = args.weights[0];
      whole.whole_bytes =
          args.num_tokens * args.num_topk * static_cast<std::int64_t>(sizeof(float));
    }
    return whole;
  }
};

// What the two exchanges have in common in which each token pulls its choices' rows.
template <typename AnyArgs>
struct PullRows {
  using Args = AnyArgs;
  static Lent LentBy(const Args& args) { return {args.rows[0], nullptr}; }
  static void SetPeers(Args& args, const PeerTables& tables) {
    args.rows = PeerTable(tables[0]);
  }
  static constexpr bool kPullsRows = true;
  static Dims DimsOf(const Args& args) {
    return {args.capacity, args.hidden * ByteWidth(args.dtype)};
  }
  // Only the rows that ranks elsewhere pull, as each is pulled by one token's rank.
  static PublishRowsArgs PublicationOf(const Args& args, const SpanningCall& call,
                                       const Span& span) {
    PublishRowsArgs some =
        PublishAll(args.rows[0], args.capacity, args.hidden * ByteWidth(args.dtype));
    std::vector<bool> is_elsewhere;
    is_elsewhere.reserve(span.process_of.size());
    for (const std::int32_t process : span.process_of) {
      is_elsewhere.push_back(process != span.here);
    }
    KeepPulledRows(call.recv_row, call.recv_counts, is_elsewhere, args.fault, some);
    return some;
  }
};

struct ReduceRowsOp : PullRows<ReduceRowsArgs> {
  static Args Read(CallReader& reader) { return ReadReduceRows(reader); }
  static Work MakeWork(const Args& args) { return ReduceRowsWork(args); }
};

struct RowDotsOp : PullRows<RowDotsArgs> {
  static Args Read(CallReader& reader) { return ReadRowDots(reader); }
  static Work MakeWork(const Args& args) { return RowDotsWork(args); }
};

using Body = std::function<void(std::int64_t)>;

ParallelFor ParallelForOn(ffi::ThreadPool& pool) {
  return [&pool](std::int64_t count, const Body& body) {
    const auto run = [](const void* opaque, std::int64_t i) {
      (*static_cast<const Body*>(opaque))(i);
    };
    RunTogether({{.args = &body, .run = run, .num_chunks = count}}, ScheduleOn(pool));
  };
}

ParallelFor OnThisThread() {
  return [](std::int64_t count, const Body& body) {
    for (std::int64_t i = 0; i < count; ++i) body(i);
  };
}

struct PlanOp {
  struct Args {
    PlanArgs plan;
    PlanOutputs own;  // lent to the rank that makes all plans of its process
    bool makes_all;   // whether that is this rank
  };
  static Args Read(CallReader& reader) {
    const PlanCall call = ReadPlan(reader);
    return {.plan = call.args, .own = call.first, .makes_all = false};
  }
  static Lent LentBy(const Args& args) { return {args.plan.topk_idx[0], &args.own}; }
  static void SetPeers(Args& args, const PeerTables& tables) {
    args.plan.topk_idx = PeerTable(tables[0]);
    args.plan.outputs = PeerTable(tables[1]);
  }
  static constexpr bool kPullsRows = false;
  static Dims DimsOf(const Args& args) {
    return {args.plan.num_tokens,
            args.plan.num_topk * static_cast<std::int64_t>(sizeof(std::int32_t))};
  }
  static PublishRowsArgs PublicationOf(const Args& args, const SpanningCall&,
                                       const Span&) {
    return PublishAll(
        args.plan.topk_idx[0], 1,
        args.plan.choices_per_rank() * static_cast<std::int64_t>(sizeof(std::int32_t)));
  }
  // All plans together cost as much as one, and less than waking a helper: one
  // rank's work makes them all, and the others have none.
  static Work MakeWork(const Args& args) {
    const auto run = [](const void* opaque, std::int64_t) {
      RunPlan(static_cast<const Args*>(opaque)->plan, OnThisThread());
    };
    return {.args = &args, .run = run, .num_chunks = args.makes_all ? 1 : 0};
  }
};

// Many stacked ranks are worth several threads.
ffi::Error PlanStacked(ffi::ThreadPool pool, ffi::RemainingArgs operands,
                       ffi::RemainingRets results, ffi::Dictionary attributes) {
  CallReader reader(operands, results, attributes);
  PlanCall call = ReadPlan(reader);
  if (reader.failed()) return reader.error();
  std::vector<PlanOutputs> outputs;
  outputs.reserve(static_cast<std::size_t>(call.args.num_ranks));
  for (std::int64_t i = 0; i < call.args.num_ranks; ++i) {
    outputs.push_back(call.args.OfStacked(call.first, i));
  }
  call.args.outputs = PeerTable(outputs.data(), sizeof(PlanOutputs));
  RunPlan(call.args, ParallelForOn(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_ep

EP_DEFINE_HANDLERS(plan, jax_ep::PlanOp, jax_ep::PlanStacked);
EP_DEFINE_HANDLERS(gather_rows, jax_ep::GatherRowsOp,
                   jax_ep::ExchangeStacked<jax_ep::GatherRowsOp>);
EP_DEFINE_HANDLERS(reduce_rows, jax_ep::ReduceRowsOp,
                   jax_ep::ExchangeStacked<jax_ep::ReduceRowsOp>);
EP_DEFINE_HANDLERS(row_dots, jax_ep::RowDotsOp,
                   jax_ep::ExchangeStacked<jax_ep::RowDotsOp>);
