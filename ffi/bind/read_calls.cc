#include "bind/read_calls.h"

#include <cstdint>
#include <optional>

namespace jax_ep {
namespace {

using ffi::DataType;

constexpr std::int64_t kWordBytes = 4;

// The choices' weights, or null where there are none: they are all ones.
const float* ReadWeights(CallReader& reader, std::int64_t choices) {
  const Tensor weights = reader.Operand("weights", 1);
  if (reader.failed() || weights.elements() == 0) return nullptr;
  reader.Require(weights.type == DataType::F32 && weights.elements() == choices,
                 "weights [.., T, K]");
  return static_cast<const float*>(weights.data);
}

// What the exchanges in which each token pulls its choices' rows have in common: the
// rows, and the geometry. Returns the type of the rows, if they are sound.
template <typename Args>
std::optional<DataType> ReadPulledRows(CallReader& reader, Args& args) {
  args.num_ranks = reader.Attribute("num_ranks");
  args.num_tokens = reader.Attribute("num_tokens");
  args.num_topk = reader.Attribute("num_topk");
  args.num_local_experts = reader.Attribute("num_experts") / args.num_ranks;
  args.capacity = reader.Attribute("capacity");
  const Tensor rows = reader.Operand("rows", 2);
  if (reader.failed()) return std::nullopt;
  args.hidden = rows.dim(0);
  args.dtype = KernelDType(rows.type).value_or(DType::kF32);
  args.rows = PeerTable(rows.data, args.capacity * args.hidden * rows.byte_width());
  reader.Require(KernelDType(rows.type).has_value(), "rows of a float dtype");
  reader.Require(
      rows.elements() == reader.where().num_stacked * args.capacity * args.hidden,
      "rows [.., C, H]");
  return reader.failed() ? std::nullopt : std::optional(rows.type);
}

}  // namespace

GatherRowsArgs ReadGatherRows(CallReader& reader) {
  const std::int64_t stack = reader.where().num_stacked;
  GatherRowsArgs args = {};
  args.num_ranks = reader.Attribute("num_ranks");
  args.num_topk = reader.Attribute("num_topk");
  args.num_local_experts = reader.Attribute("num_experts") / args.num_ranks;
  args.capacity = reader.Attribute("capacity");
  args.zero_tail = reader.Attribute("zero_tail") != 0;
  const Tensor x = reader.Operand("x", 2);
  if (reader.failed()) return args;
  args.num_tokens = x.dim(1);
  args.hidden = x.dim(0);
  args.row_bytes = args.hidden * x.byte_width();
  reader.Require(x.elements() == stack * args.num_tokens * args.hidden, "x [.., T, H]");
  args.x = PeerTable(x.data, args.num_tokens * args.row_bytes);
  const std::int64_t choices = args.num_tokens * args.num_topk;
  const float* weights = ReadWeights(reader, stack * choices);
  args.weights = PeerTable(weights, choices * kWordBytes);
  args.scaled = weights != nullptr;
  args.dtype = KernelDType(x.type).value_or(DType::kF32);
  reader.Require(!args.scaled || KernelDType(x.type).has_value(),
                 "x of a float dtype to scale");
  const auto int32 = [&](const char* name, std::int64_t elements) {
    return reader.Operand<std::int32_t>(name, DataType::S32, stack * elements);
  };
  args.recv_choice = int32("recv_choice", args.capacity);
  args.recv_row = int32("recv_row", args.capacity);
  args.recv_counts = int32("recv_counts", args.num_ranks);
  args.group_sizes = int32("group_sizes", args.num_local_experts);
  args.group_rows = int32("group_rows", args.num_local_experts);
  args.rows = reader.Result<void>("rows", x.type, stack * args.capacity * args.hidden);
  return args;
}

ReduceRowsArgs ReadReduceRows(CallReader& reader) {
  ReduceRowsArgs args = {};
  const auto type = ReadPulledRows(reader, args);
  if (!type) return args;
  const std::int64_t tokens = reader.where().num_stacked * args.num_tokens;
  args.weights = ReadWeights(reader, tokens * args.num_topk);
  args.topk_idx =
      reader.Operand<std::int32_t>("topk_idx", DataType::S32, tokens * args.num_topk);
  args.send_row =
      reader.Operand<std::int32_t>("send_row", DataType::S32, tokens * args.num_topk);
  args.out = reader.Result<void>("out", *type, tokens * args.hidden);
  return args;
}

RowDotsArgs ReadRowDots(CallReader& reader) {
  RowDotsArgs args = {};
  const auto type = ReadPulledRows(reader, args);
  if (!type) return args;
  const std::int64_t tokens = reader.where().num_stacked * args.num_tokens;
  args.dout = reader.Operand<void>("dout", *type, tokens * args.hidden);
  args.topk_idx =
      reader.Operand<std::int32_t>("topk_idx", DataType::S32, tokens * args.num_topk);
  args.send_row =
      reader.Operand<std::int32_t>("send_row", DataType::S32, tokens * args.num_topk);
  args.dots = reader.Result<float>("dots", DataType::F32, tokens * args.num_topk);
  return args;
}

PlanCall ReadPlan(CallReader& reader) {
  const std::int64_t stack = reader.where().num_stacked;
  PlanArgs args = {};
  args.num_ranks = reader.Attribute("num_ranks");
  args.num_tokens = reader.Attribute("num_tokens");
  args.num_topk = reader.Attribute("num_topk");
  args.num_experts = reader.Attribute("num_experts");
  args.capacity = reader.Attribute("capacity");
  args.alignment = reader.Attribute("alignment");
  const std::int64_t choices = args.choices_per_rank();
  args.topk_idx = PeerTable(
      reader.Operand<std::int32_t>("topk_idx", DataType::S32, stack * choices),
      choices * kWordBytes);
  const auto int32 = [&](const char* name, std::int64_t elements) {
    return reader.Result<std::int32_t>(name, DataType::S32, stack * elements);
  };
  // In the order of the results: an initializer list is evaluated as it is written.
  return {.args = args,
          .first = {
              .group_sizes = int32("group_sizes", args.num_local_experts()),
              .kept = reader.Result<bool>("kept", DataType::PRED, stack * choices),
              .expert_load = int32("expert_load", args.num_experts),
              .recv_counts = int32("recv_counts", args.num_ranks),
              .num_dropped = int32("num_dropped", 1),
              .send_row = int32("send_row", choices),
              .recv_choice = int32("recv_choice", args.capacity),
              .recv_row = int32("recv_row", args.capacity),
              .group_rows = int32("group_rows", args.num_local_experts()),
              .fingerprint =
                  reader.Result<std::uint32_t>("fingerprint", DataType::U32, stack),
          }};
}

}  // namespace jax_ep
