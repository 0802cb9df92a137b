// Implements ops.h: reads calls in the order in which Python passes them, and checks
// what it finds.
#include "bind/ops.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace jax_ep {
namespace {

constexpr std::int64_t kWordBytes = 4;

// The first operands of every op but the one that makes them.
PlanArrays ReadPlanArrays(CallReader& reader, const PlanSizes& sizes) {
  PlanArrays plan = {};
  VisitPlanArrays(
      plan, sizes, [&]<typename T>(const char* name, T*& array, std::int64_t elements) {
        array = reader.Operand<T>(name, reader.where().num_stacked * elements);
      });
  return plan;
}

const float* ReadWeights(CallReader& reader, const PlanSizes& sizes) {
  return reader.Operand<float>(
      "weights", reader.where().num_stacked * sizes.num_tokens * sizes.num_topk);
}

GatherRowsArgs ReadGathered(CallReader& reader, const PlanSizes& sizes,
                            const PlanArrays& plan, const Tensor& x) {
  const std::int64_t stack = reader.where().num_stacked;
  GatherRowsArgs args = {};
  args.num_ranks = sizes.num_ranks;
  args.num_tokens = sizes.num_tokens;
  args.num_topk = sizes.num_topk;
  args.num_local_experts = sizes.num_local_experts();
  args.capacity = sizes.capacity;
  args.recv_choice = plan.recv_choice;
  args.recv_row = plan.recv_row;
  args.recv_counts = plan.recv_counts;
  args.group_sizes = plan.group_sizes;
  args.group_rows = plan.group_rows;
  args.send_rank = plan.send_rank;
  args.send_row = plan.send_row;
  args.zero_tail = reader.Attribute("zero_tail") != 0;
  if (reader.failed()) return args;
  args.hidden = x.dim(0);
  args.row_bytes = args.hidden * x.byte_width();
  args.dtype = KernelDType(x.type).value_or(DType::kF32);
  reader.Require(x.elements() == stack * args.num_tokens * args.hidden, "x [.., T, H]");
  args.x = PeerTable(x.data, args.num_tokens * args.row_bytes);
  return args;
}

std::int64_t StackedTokens(const CallReader& reader, const PlanSizes& sizes) {
  return reader.where().num_stacked * sizes.num_tokens;
}

// What the ops in which each token pulls its choices' rows are told of them.
template <typename KernelArgs>
KernelArgs ReadPulled(CallReader& reader, const PlanSizes& sizes,
                      const PlanArrays& plan, const Tensor& rows) {
  KernelArgs args = {};
  args.num_ranks = sizes.num_ranks;
  args.num_tokens = sizes.num_tokens;
  args.num_topk = sizes.num_topk;
  args.capacity = sizes.capacity;
  args.send_rank = plan.send_rank;
  args.send_row = plan.send_row;
  if (reader.failed()) return args;
  args.hidden = rows.dim(0);
  args.dtype = KernelDType(rows.type).value_or(DType::kF32);
  args.rows = PeerTable(rows.data, args.capacity * args.hidden * rows.byte_width());
  reader.Require(KernelDType(rows.type).has_value(), "rows of a float dtype");
  reader.Require(
      rows.elements() == reader.where().num_stacked * args.capacity * args.hidden,
      "rows [.., C, H]");
  return args;
}

ReduceRowsArgs ReadReduced(CallReader& reader, const PlanSizes& sizes,
                           const PlanArrays& plan, const Tensor& rows,
                           const float* weights, const char* out) {
  auto args = ReadPulled<ReduceRowsArgs>(reader, sizes, plan, rows);
  args.weights = weights;
  args.ranks_per_node = ReadRanksPerNode(reader);
  args.out = reader.Result(out, rows.type, StackedTokens(reader, sizes) * args.hidden);
  return args;
}

RowDotsArgs ReadRowDots(CallReader& reader, const PlanSizes& sizes,
                        const PlanArrays& plan) {
  const Tensor rows = reader.Operand("rows", 2);
  auto args = ReadPulled<RowDotsArgs>(reader, sizes, plan, rows);
  const std::int64_t tokens = StackedTokens(reader, sizes);
  args.dout = reader.Operand("dout", rows.type, tokens * args.hidden);
  args.dots = reader.Result<float>("dots", tokens * sizes.num_topk);
  return args;
}

}  // namespace

PlanSizes ReadSizes(CallReader& reader) {
  return {.num_ranks = reader.Attribute("num_ranks"),
          .num_tokens = reader.Attribute("num_tokens"),
          .num_topk = reader.Attribute("num_topk"),
          .num_experts = reader.Attribute("num_experts"),
          .capacity = reader.Attribute("capacity")};
}

std::int64_t ReadRanksPerNode(CallReader& reader) {
  const std::int64_t ranks = reader.Attribute("ranks_per_node");
  reader.Require(ranks > 0, "a rank on a node at least");
  return ranks;
}

PlanArgs ReadPlanArgs(CallReader& reader, const PlanSizes& sizes, std::int64_t ranks) {
  PlanArgs args = {};
  args.num_ranks = sizes.num_ranks;
  args.num_tokens = sizes.num_tokens;
  args.num_topk = sizes.num_topk;
  args.num_experts = sizes.num_experts;
  args.capacity = sizes.capacity;
  args.alignment = reader.Attribute("alignment");
  const std::int64_t choices = args.choices_per_rank();
  args.topk_idx = PeerTable(reader.Operand<std::int32_t>("topk_idx", ranks * choices),
                            choices * kWordBytes);
  return args;
}

PlanArrays ReadPlanResults(CallReader& reader, const PlanSizes& sizes,
                           std::int64_t ranks) {
  PlanArrays plan = {};
  VisitPlanArrays(plan, sizes,
                  [&]<typename T>(const char* name, T*& array, std::int64_t elements) {
                    array = reader.Result<T>(name, ranks * elements);
                  });
  return plan;
}

PlanOp::Call PlanOp::Read(CallReader& reader) {
  const std::int64_t stack = reader.where().num_stacked;
  const PlanSizes sizes = ReadSizes(reader);
  Call call = {};
  call.args = ReadPlanArgs(reader, sizes, stack);
  call.own = ReadPlanResults(reader, sizes, stack);
  return call;
}

std::vector<LentRows> PlanOp::LentBy(const Call& call) {
  return {{.data = call.args.topk_idx[0],
           .num_rows = call.args.num_tokens,
           .row_bytes = call.args.num_topk * kWordBytes},
          {.data = &call.own, .num_rows = 0, .row_bytes = 0}};
}

void PlanOp::SetPeers(Call& call, Tables tables) {
  call.args.topk_idx = tables[0];
  call.args.outputs = tables[1];
}

std::vector<LentRows> GatherOp::LentBy(const Call& call) {
  std::vector<LentRows> lent;
  for (const GatherRowsArgs& args : call.kernels) {
    lent.push_back(
        {.data = args.x[0], .num_rows = args.num_tokens, .row_bytes = args.row_bytes});
    if (args.scaled) {
      lent.push_back({.data = args.weights[0],
                      .num_rows = args.num_tokens,
                      .row_bytes = args.num_topk * kWordBytes});
    }
  }
  return lent;
}

void GatherOp::SetPeers(Call& call, Tables tables) {
  std::size_t next = 0;
  for (GatherRowsArgs& args : call.kernels) {
    args.x = tables[next++];
    if (args.scaled) args.weights = tables[next++];
  }
}

GatherOp::Call GatherRowsOp::Read(CallReader& reader) {
  const PlanSizes sizes = ReadSizes(reader);
  Call call = {.plan = ReadPlanArrays(reader, sizes), .kernels = {}};
  for (const Tensor& x : reader.Operands("*x", 2)) {
    GatherRowsArgs args = ReadGathered(reader, sizes, call.plan, x);
    args.rows = reader.Result("*rows", x.type,
                              reader.where().num_stacked * args.capacity * args.hidden);
    call.kernels.push_back(args);
  }
  return call;
}

GatherOp::Call GatherScaledOp::Read(CallReader& reader) {
  const PlanSizes sizes = ReadSizes(reader);
  Call call = {.plan = ReadPlanArrays(reader, sizes), .kernels = {}};
  const Tensor x = reader.Operand("x", 2);
  GatherRowsArgs args = ReadGathered(reader, sizes, call.plan, x);
  args.weights = PeerTable(ReadWeights(reader, sizes),
                           sizes.num_tokens * sizes.num_topk * kWordBytes);
  args.scaled = true;
  reader.Require(KernelDType(x.type).has_value(), "x of a float dtype to scale");
  args.rows = reader.Result("rows", x.type,
                            reader.where().num_stacked * args.capacity * args.hidden);
  call.kernels.push_back(args);
  return call;
}

ReduceRowsOp::Call ReduceRowsOp::Read(CallReader& reader) {
  const PlanSizes sizes = ReadSizes(reader);
  Call call = {.plan = ReadPlanArrays(reader, sizes), .kernels = {}};
  for (const Tensor& rows : reader.Operands("*rows", 2)) {
    call.kernels.push_back(
        ReadReduced(reader, sizes, call.plan, rows, nullptr, "*out"));
  }
  return call;
}

ReduceScaledOp::Call ReduceScaledOp::Read(CallReader& reader) {
  const PlanSizes sizes = ReadSizes(reader);
  Call call = {.plan = ReadPlanArrays(reader, sizes), .kernels = {}};
  const Tensor rows = reader.Operand("rows", 2);
  const float* weights = ReadWeights(reader, sizes);
  call.kernels = {ReadReduced(reader, sizes, call.plan, rows, weights, "out")};
  return call;
}

RowDotsOp::Call RowDotsOp::Read(CallReader& reader) {
  const PlanSizes sizes = ReadSizes(reader);
  Call call = {.plan = ReadPlanArrays(reader, sizes), .kernels = {}};
  call.kernels = {ReadRowDots(reader, sizes, call.plan)};
  return call;
}

}  // namespace jax_ep
