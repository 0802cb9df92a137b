// Implements local_ops.h.
#include "bind/local_ops.h"

#include <cstddef>
#include <cstdint>
#include <vector>

#include "bind/call_reader.h"
#include "common/dtype.h"
#include "common/peer_table.h"

namespace jax_ep {
namespace {

PlanArrays ReadSendLists(CallReader& reader, const PlanSizes& sizes) {
  reader.Require(reader.where().num_stacked == 1, "one rank");
  PlanArrays plan = {};
  const std::int64_t choices = sizes.num_tokens * sizes.num_topk;
  plan.send_rank = reader.Operand<std::int32_t>("send_rank", choices);
  plan.send_row = reader.Operand<std::int32_t>("send_row", choices);
  return plan;
}

const float* ReadWeights(CallReader& reader, const PlanSizes& sizes, bool scaled) {
  if (!scaled) return nullptr;
  return reader.Operand<float>("weights", sizes.num_tokens * sizes.num_topk);
}

// Of what pieces consist, all alike.
struct Elements {
  ffi::DataType type = ffi::DataType::F32;
  std::int64_t hidden = 1;
  std::int64_t rows = 1;  // in each piece

  std::int64_t width() const { return static_cast<std::int64_t>(ffi::ByteWidth(type)); }
  std::int64_t row_bytes() const { return hidden * width(); }
  std::int64_t in(std::int64_t num_rows) const { return num_rows * hidden; }
};

// Checks that pieces are alike, and as many as make up so many rows.
Elements ElementsOf(CallReader& reader, const std::vector<Tensor>& pieces,
                    std::int64_t num_rows) {
  if (reader.failed() || pieces.empty()) {
    reader.Require(!pieces.empty(), "a piece at least");
    return {};
  }
  const auto count = static_cast<std::int64_t>(pieces.size());
  const Elements of = {
      .type = pieces[0].type, .hidden = pieces[0].dim(0), .rows = num_rows / count};
  bool alike = of.rows * count == num_rows;
  for (const Tensor& piece : pieces) {
    alike = alike && piece.type == of.type && piece.elements() == of.in(of.rows);
  }
  reader.Require(alike, "pieces of equal size");
  return of;
}

// The floats that these are: one of the two may be called integers.
DType FloatOf(CallReader& reader, const Elements& these, const Elements& those) {
  const auto dtype = KernelDType(these.type);
  const auto other = KernelDType(those.type);
  reader.Require(
      these.row_bytes() == those.row_bytes() && these.width() == those.width(),
      "elements alike");
  reader.Require(dtype.has_value() || other.has_value(), "rows of a float dtype");
  return dtype ? *dtype : other.value_or(DType::kF32);
}

// The pieces of a result.
std::vector<Tensor> ReadResults(CallReader& reader, const char* name) {
  std::vector<Tensor> results;
  while (results.empty() || (reader.results_left() > 0 && !reader.failed())) {
    results.push_back(reader.Result(name, 2));
  }
  return results;
}

GatherRowsArgs ReadGathered(CallReader& reader, const PlanSizes& sizes,
                            const PlanArrays& plan) {
  GatherRowsArgs args = {};
  args.num_ranks = sizes.num_ranks;
  args.num_tokens = sizes.num_tokens;
  args.num_topk = sizes.num_topk;
  args.num_local_experts = sizes.num_local_experts();
  args.capacity = sizes.capacity;
  args.send_rank = plan.send_rank;
  args.send_row = plan.send_row;
  args.group_sizes = plan.group_sizes;
  args.group_rows = plan.group_rows;
  args.zero_tail = reader.Attribute("zero_tail") != 0;
  return args;
}

// A kernel for each piece of tokens. The first zeroes what is to be zero.
std::vector<GatherRowsArgs> ByPiece(const GatherRowsArgs& whole, const Elements& of,
                                    const std::vector<Tensor>& pieces) {
  std::vector<GatherRowsArgs> kernels;
  for (const Tensor& x : pieces) {
    const std::int64_t first =
        static_cast<std::int64_t>(kernels.size()) * of.rows * whole.num_topk;
    GatherRowsArgs args = whole;
    args.num_tokens = of.rows;
    args.x = PeerTable(x.data, 0);
    args.send_rank += first;
    args.send_row += first;
    if (whole.scaled) {
      args.weights = PeerTable(static_cast<const float*>(whole.weights[0]) + first, 0);
    }
    if (first > 0) {
      args.num_local_experts = 0;
      args.zero_tail = false;
    }
    kernels.push_back(args);
  }
  return kernels;
}

}  // namespace

LocalPlanOp::Call LocalPlanOp::Read(CallReader& reader) {
  const PlanSizes sizes = ReadSizes(reader);
  reader.Require(reader.where().num_stacked == 1, "one rank");
  const PlanArgs args = ReadPlanArgs(reader, sizes, sizes.num_ranks);
  return {.args = args,
          .own = ReadPlanResults(reader, sizes, 1),
          .rank = reader.where().rank};
}

LocalGather::Call LocalGather::Read(CallReader& reader, bool scaled) {
  const PlanSizes sizes = ReadSizes(reader);
  const Tensor onto = reader.Operand("onto", 2);
  Call call;
  call.plan = ReadSendLists(reader, sizes);
  const std::int64_t groups = sizes.num_local_experts();
  call.plan.group_sizes = reader.Operand<std::int32_t>("group_sizes", groups);
  call.plan.group_rows = reader.Operand<std::int32_t>("group_rows", groups);
  GatherRowsArgs args = ReadGathered(reader, sizes, call.plan);
  args.scaled = scaled;
  args.weights = PeerTable(ReadWeights(reader, sizes, scaled), 0);
  const std::vector<Tensor> x = reader.Operands("*x", 2);
  const std::vector<Tensor> rows = ReadResults(reader, "*rows");
  const Elements of = ElementsOf(reader, x, sizes.num_tokens);
  const Elements to = ElementsOf(reader, rows, sizes.capacity);
  reader.Require(of.row_bytes() == to.row_bytes(), "rows as long as those of x");
  if (scaled) args.dtype = FloatOf(reader, of, to);
  reader.Require(onto.elements() == 0 || onto.data == rows[0].data,
                 "onto in the buffer of rows");
  if (reader.failed()) return call;
  args.hidden = of.hidden;
  args.row_bytes = of.row_bytes();
  for (const Tensor& piece : rows) call.pieces.push_back(piece.data);
  if (rows.size() == 1) {
    args.rows = call.pieces[0];
  } else {
    args.pieces = call.pieces.data();
    args.piece_rows = to.rows;
  }
  call.kernels = ByPiece(args, of, x);
  return call;
}

LocalReduce::Call LocalReduce::Read(CallReader& reader, bool scaled) {
  const PlanSizes sizes = ReadSizes(reader);
  Call call;
  call.plan = ReadSendLists(reader, sizes);
  const float* weights = ReadWeights(reader, sizes, scaled);
  const std::vector<Tensor> rows = reader.Operands("*rows", 2);
  const std::vector<Tensor> outs = ReadResults(reader, "*out");
  const auto count = static_cast<std::int64_t>(rows.size());
  reader.Require(count == 1 || count == sizes.num_ranks,
                 "a piece, or one of each rank");
  const Elements of = ElementsOf(reader, rows, sizes.capacity * count);
  const Elements to = ElementsOf(reader, outs, sizes.num_tokens);
  ReduceRowsArgs args = {};
  args.num_ranks = sizes.num_ranks;
  args.ranks_per_node = ReadRanksPerNode(reader);
  args.num_tokens = to.rows;
  args.num_topk = sizes.num_topk;
  args.capacity = sizes.capacity;
  args.hidden = of.hidden;
  args.dtype = FloatOf(reader, of, to);
  if (reader.failed()) return call;
  for (const Tensor& piece : rows) call.pieces.push_back(piece.data);
  args.rows = PeerTable(rows[0].data, 0);
  for (const Tensor& out : outs) {
    const std::int64_t first =
        static_cast<std::int64_t>(call.kernels.size()) * to.rows * args.num_topk;
    args.send_rank = call.plan.send_rank + first;
    args.send_row = call.plan.send_row + first;
    args.weights = weights == nullptr ? nullptr : weights + first;
    args.out = out.data;
    call.kernels.push_back(args);
  }
  return call;
}

LocalRowDotsOp::Call LocalRowDotsOp::Read(CallReader& reader) {
  const PlanSizes sizes = ReadSizes(reader);
  Call call = {.plan = ReadSendLists(reader, sizes), .kernels = {}};
  const std::vector<Tensor> rows = {reader.Operand("rows", 2)};
  const std::vector<Tensor> dout = reader.Operands("*dout", 2);
  const Elements of = ElementsOf(reader, rows, sizes.capacity);
  const Elements by = ElementsOf(reader, dout, sizes.num_tokens);
  auto* dots = reader.Result<float>("dots", sizes.num_tokens * sizes.num_topk);
  RowDotsArgs args = {};
  args.num_ranks = sizes.num_ranks;
  args.num_tokens = by.rows;
  args.num_topk = sizes.num_topk;
  args.capacity = sizes.capacity;
  args.hidden = of.hidden;
  args.dtype = FloatOf(reader, of, by);
  if (reader.failed()) return call;
  args.rows = PeerTable(rows[0].data, 0);
  for (const Tensor& piece : dout) {
    const std::int64_t first =
        static_cast<std::int64_t>(call.kernels.size()) * by.rows * args.num_topk;
    args.send_rank = call.plan.send_rank + first;
    args.send_row = call.plan.send_row + first;
    args.dout = piece.data;
    args.dots = dots + first;
    call.kernels.push_back(args);
  }
  return call;
}

}  // namespace jax_ep
