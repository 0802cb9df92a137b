#include "cpu/plan.h"

#include <cstdint>
#include <functional>

#include "bind/call_reader.h"
#include "bind/exchange.h"
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

PlanArgs ReadPlanArgs(CallReader& reader) {
  using ffi::DataType;
  const std::int64_t num_ranks = reader.Attribute("num_ranks");
  const std::int64_t num_experts = reader.Attribute("num_experts");
  const std::int64_t capacity = reader.Attribute("capacity");
  const std::int64_t num_tokens = reader.Attribute("num_tokens");
  const std::int64_t num_topk = reader.Attribute("num_topk");
  const Tensor ranks = reader.Operand("rank", 0);
  const std::int64_t n = ranks.elements();
  const std::int64_t choices = num_tokens * num_topk;
  const std::int64_t num_local = num_experts / num_ranks;
  reader.Require(ranks.type == DataType::S32, "rank of int32");
  return {
      .topk_idx =
          reader.Operand<std::int32_t>("topk_idx", DataType::S32, num_ranks * choices),
      .ranks = static_cast<const std::int32_t*>(ranks.data),
      .num_plans = n,
      .num_ranks = num_ranks,
      .num_tokens = num_tokens,
      .num_topk = num_topk,
      .num_experts = num_experts,
      .capacity = capacity,
      .alignment = reader.Attribute("alignment"),
      .group_sizes =
          reader.Result<std::int32_t>("group_sizes", DataType::S32, n * num_local),
      .kept = reader.Result<bool>("kept", DataType::PRED, n * choices),
      .expert_load =
          reader.Result<std::int32_t>("expert_load", DataType::S32, n * num_experts),
      .recv_counts =
          reader.Result<std::int32_t>("recv_counts", DataType::S32, n * num_ranks),
      .num_dropped = reader.Result<std::int32_t>("num_dropped", DataType::S32, n),
      .send_row = reader.Result<std::int32_t>("send_row", DataType::S32, n * choices),
      .recv_choice =
          reader.Result<std::int32_t>("recv_choice", DataType::S32, n * capacity),
      .recv_row = reader.Result<std::int32_t>("recv_row", DataType::S32, n * capacity),
      .group_rows =
          reader.Result<std::int32_t>("group_rows", DataType::S32, n * num_local),
      .fingerprint = reader.Result<std::uint32_t>("fingerprint", DataType::U32, n),
  };
}

// A purely local op: the choices of all ranks have been gathered before. One plan is
// made on the calling thread, since the peers' plans are being made on theirs.
ffi::Error Plan(ffi::ThreadPool pool, ffi::RemainingArgs operands,
                ffi::RemainingRets results, ffi::Dictionary attributes) {
  CallReader reader(operands, results, attributes);
  const PlanArgs args = ReadPlanArgs(reader);
  if (reader.failed()) return reader.error();
  RunPlan(args, args.num_plans > 1 ? ParallelForOn(pool) : OnThisThread());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_ep

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_plan, jax_ep::Plan,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs());
