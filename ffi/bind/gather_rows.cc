#include "cpu/gather_rows.h"

#include <array>
#include <cstdint>
#include <numeric>

#include "bind/call_reader.h"
#include "bind/exchange.h"

namespace jax_ep {
namespace {

class GatherRowsOp {
 public:
  using Args = GatherRowsArgs;

  explicit GatherRowsOp(CallReader& reader)
      : num_ranks_(reader.Attribute("num_ranks")),
        num_local_(reader.Attribute("num_experts") / num_ranks_),
        capacity_(reader.Attribute("capacity")),
        num_topk_(reader.Attribute("num_topk")),
        zero_tail_(reader.Attribute("zero_tail") != 0),
        x_(reader.Operand("x", 2)),
        weights_(reader.Operand("weights", 1)) {
    if (reader.failed()) return;
    num_tokens_ = x_.dim(1);
    hidden_ = x_.dim(0);
    const std::int64_t token_elements = num_tokens_ * hidden_;
    const std::int64_t stack =
        x_.dims.size() == 2 ? 1 : static_cast<std::int64_t>(x_.dims[0]);
    reader.Require(x_.elements() == stack * token_elements, "x [.., T, H]");
    recv_choice_ = reader.Operand<std::int32_t>("recv_choice", ffi::DataType::S32,
                                                stack * capacity_);
    recv_row_ =
        reader.Operand<std::int32_t>("recv_row", ffi::DataType::S32, stack * capacity_);
    recv_counts_ = reader.Operand<std::int32_t>("recv_counts", ffi::DataType::S32,
                                                stack * num_ranks_);
    group_sizes_ = reader.Operand<std::int32_t>("group_sizes", ffi::DataType::S32,
                                                stack * num_local_);
    group_rows_ = reader.Operand<std::int32_t>("group_rows", ffi::DataType::S32,
                                               stack * num_local_);
    rows_ = static_cast<char*>(
        reader.Result<void>("rows", x_.type, stack * capacity_ * hidden_));
    has_weights_ = weights_.elements() > 0;
    if (has_weights_) {
      reader.Require(weights_.type == ffi::DataType::F32 &&
                         weights_.elements() == stack * num_tokens_ * num_topk_,
                     "weights [.., T, K]");
      reader.Require(KernelDType(x_.type).has_value(), "x of a float dtype to scale");
    }
  }

  Args At(std::int64_t i) const {
    const std::int32_t* counts = recv_counts_ + i * num_ranks_;
    return {
        .x = nullptr,
        .weights = nullptr,
        .recv_choice = recv_choice_ + i * capacity_,
        .recv_row = recv_row_ + i * capacity_,
        .group_sizes = group_sizes_ + i * num_local_,
        .group_rows = group_rows_ + i * num_local_,
        .rows = rows_ + i * capacity_ * row_bytes(),
        .num_received = std::accumulate(counts, counts + num_ranks_, std::int64_t{0}),
        .num_tokens = num_tokens_,
        .num_topk = num_topk_,
        .num_local_experts = num_local_,
        .capacity = capacity_,
        .hidden = hidden_,
        .row_bytes = row_bytes(),
        .dtype = KernelDType(x_.type).value_or(DType::kF32),
        .scaled = has_weights_,
        .zero_tail = zero_tail_,
    };
  }

  Lent LentAt(std::int64_t i, const Args& /*args*/) const {
    const char* x = static_cast<const char*>(x_.data) + i * num_tokens_ * row_bytes();
    const float* weights = has_weights_ ? static_cast<const float*>(weights_.data) +
                                              i * num_tokens_ * num_topk_
                                        : nullptr;
    return {x, weights};
  }

  static void SetPeers(Args& args, const PeerTables& tables) {
    args.x = tables[0];
    args.weights = tables[1];
  }

  static Work MakeWork(const Args& args) { return GatherRowsWork(args); }

  const char* name() const { return has_weights_ ? "gradient of combine" : "dispatch"; }

  std::array<std::int64_t, 2> lent_dims() const { return {num_tokens_, row_bytes()}; }

 private:
  std::int64_t row_bytes() const { return hidden_ * x_.byte_width(); }

  std::int64_t num_ranks_;
  std::int64_t num_local_;
  std::int64_t capacity_;
  std::int64_t num_topk_;
  bool zero_tail_;
  Tensor x_;
  Tensor weights_;
  std::int64_t num_tokens_ = 0;
  std::int64_t hidden_ = 0;
  bool has_weights_ = false;
  const std::int32_t* recv_choice_ = nullptr;
  const std::int32_t* recv_row_ = nullptr;
  const std::int32_t* recv_counts_ = nullptr;
  const std::int32_t* group_sizes_ = nullptr;
  const std::int32_t* group_rows_ = nullptr;
  char* rows_ = nullptr;
};

}  // namespace
}  // namespace jax_ep

EP_DEFINE_EXCHANGE(gather_rows, jax_ep::GatherRowsOp,
                   jax_ep::ExchangeStacked<jax_ep::GatherRowsOp>);
