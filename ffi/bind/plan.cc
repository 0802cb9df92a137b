#include "cpu/plan.h"

#include <array>
#include <cstdint>
#include <functional>

#include "bind/call_reader.h"
#include "bind/exchange.h"
#include "fabric/meeting.h"
#include "fabric/work_share.h"

namespace jax_ep {
namespace {

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

class PlanOp {
 public:
  struct Args {
    PlanArgs plan;
    PlanOutputs own;  // lent to the rank that makes all plans
    bool is_first;    // whether that is this rank
  };

  explicit PlanOp(CallReader& reader)
      : rank_(reader.where().rank),
        num_ranks_(reader.Attribute("num_ranks")),
        num_experts_(reader.Attribute("num_experts")),
        num_tokens_(reader.Attribute("num_tokens")),
        num_topk_(reader.Attribute("num_topk")),
        capacity_(reader.Attribute("capacity")),
        alignment_(reader.Attribute("alignment")) {
    if (reader.failed()) return;
    using ffi::DataType;
    const Tensor topk_idx = reader.Operand("topk_idx", 2);
    const std::int64_t stack =
        topk_idx.dims.size() == 2 ? 1 : static_cast<std::int64_t>(topk_idx.dims[0]);
    reader.Require(
        topk_idx.type == DataType::S32 && topk_idx.elements() == stack * choices(),
        "topk_idx [.., T, K] of int32");
    topk_idx_ = static_cast<const std::int32_t*>(topk_idx.data);
    const auto int32 = [&](const char* name, std::int64_t elements) {
      return reader.Result<std::int32_t>(name, DataType::S32, stack * elements);
    };
    first_ = {
        .group_sizes = int32("group_sizes", num_local()),
        .kept = reader.Result<bool>("kept", DataType::PRED, stack * choices()),
        .expert_load = int32("expert_load", num_experts_),
        .recv_counts = int32("recv_counts", num_ranks_),
        .num_dropped = int32("num_dropped", 1),
        .send_row = int32("send_row", choices()),
        .recv_choice = int32("recv_choice", capacity_),
        .recv_row = int32("recv_row", capacity_),
        .group_rows = int32("group_rows", num_local()),
        .fingerprint =
            reader.Result<std::uint32_t>("fingerprint", DataType::U32, stack),
    };
  }

  Args At(std::int64_t i) const {
    return {
        .plan = {.topk_idx = nullptr,
                 .outputs = nullptr,
                 .num_ranks = num_ranks_,
                 .num_tokens = num_tokens_,
                 .num_topk = num_topk_,
                 .num_experts = num_experts_,
                 .capacity = capacity_,
                 .alignment = alignment_},
        .own = {.group_sizes = first_.group_sizes + i * num_local(),
                .kept = first_.kept + i * choices(),
                .expert_load = first_.expert_load + i * num_experts_,
                .recv_counts = first_.recv_counts + i * num_ranks_,
                .num_dropped = first_.num_dropped + i,
                .send_row = first_.send_row + i * choices(),
                .recv_choice = first_.recv_choice + i * capacity_,
                .recv_row = first_.recv_row + i * capacity_,
                .group_rows = first_.group_rows + i * num_local(),
                .fingerprint = first_.fingerprint + i},
        .is_first = rank_[i] == 0,
    };
  }

  Lent LentAt(std::int64_t i, const Args& args) const {
    return {topk_idx_ + i * choices(), &args.own};
  }

  static void SetPeers(Args& args, const PeerTables& tables) {
    args.plan.topk_idx = tables[0];
    args.plan.outputs = tables[1];
  }

  // All plans together cost as much as one, and less than waking a helper: the first
  // rank's work makes them all, and the others have none.
  static Work MakeWork(const Args& args) {
    const auto run = [](const void* opaque, std::int64_t) {
      RunPlan(static_cast<const Args*>(opaque)->plan, OnThisThread());
    };
    return {.args = &args, .run = run, .num_chunks = args.is_first ? 1 : 0};
  }

  const char* name() const { return "make_plan"; }

  std::array<std::int64_t, 2> lent_dims() const {
    return {num_tokens_, num_topk_ * static_cast<std::int64_t>(sizeof(std::int32_t))};
  }

 private:
  std::int64_t choices() const { return num_tokens_ * num_topk_; }
  std::int64_t num_local() const { return num_experts_ / num_ranks_; }

  const std::int32_t* rank_;
  std::int64_t num_ranks_;
  std::int64_t num_experts_;
  std::int64_t num_tokens_;
  std::int64_t num_topk_;
  std::int64_t capacity_;
  std::int64_t alignment_;
  const std::int32_t* topk_idx_ = nullptr;
  PlanOutputs first_ = {};  // of the first stacked rank
};

// Many stacked ranks are worth several threads.
ffi::Error PlanStacked(ffi::ThreadPool pool, ffi::RemainingArgs operands,
                       ffi::RemainingRets results, ffi::Dictionary attributes) {
  CallReader reader(operands, results, attributes);
  const PlanOp op(reader);
  if (reader.failed()) return reader.error();
  const StackedRanks<PlanOp> ranks(op, reader.where().num_stacked);
  RunPlan(ranks.args().front().plan, ParallelForOn(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_ep

EP_DEFINE_EXCHANGE(plan, jax_ep::PlanOp, jax_ep::PlanStacked);
