#ifndef JAX_EP_FFI_BIND_TOKEN_ROWS_H_
#define JAX_EP_FFI_BIND_TOKEN_ROWS_H_

#include <array>
#include <cstdint>

#include "bind/call_reader.h"
#include "fabric/meeting.h"

namespace jax_ep {

// What the two exchanges have in common in which each token pulls the rows of its
// choices: the rows, lent to the peers, and where each choice's row is.
class TokenRows {
 public:
  // Reads `rows`, then an operand that the caller takes by `read_second`, then the
  // choices.
  template <typename ReadSecond>
  TokenRows(CallReader& reader, ReadSecond read_second)
      : num_local_(reader.Attribute("num_experts") / reader.Attribute("num_ranks")),
        capacity_(reader.Attribute("capacity")),
        num_topk_(reader.Attribute("num_topk")),
        num_tokens_(reader.Attribute("num_tokens")),
        rows_(reader.Operand("rows", 2)) {
    if (reader.failed()) return;
    hidden_ = rows_.dim(0);
    stack_ = rows_.dims.size() == 2 ? 1 : static_cast<std::int64_t>(rows_.dims[0]);
    reader.Require(rows_.elements() == stack_ * capacity_ * hidden_, "rows [.., C, H]");
    reader.Require(KernelDType(rows_.type).has_value(), "rows of a float dtype");
    read_second(*this);
    topk_idx_ = reader.Operand<std::int32_t>("topk_idx", ffi::DataType::S32, choices());
    send_row_ = reader.Operand<std::int32_t>("send_row", ffi::DataType::S32, choices());
  }

  // Fills in the fields that ReduceRowsArgs and RowDotsArgs share, for the i-th rank.
  template <typename Args>
  void FillArgs(std::int64_t i, Args& args) const {
    args.topk_idx = topk_idx_ + i * num_tokens_ * num_topk_;
    args.send_row = send_row_ + i * num_tokens_ * num_topk_;
    args.num_tokens = num_tokens_;
    args.num_topk = num_topk_;
    args.num_local_experts = num_local_;
    args.hidden = hidden_;
    args.dtype = *KernelDType(rows_.type);
  }

  Lent LentAt(std::int64_t i) const {
    const char* rows = static_cast<const char*>(rows_.data);
    return {rows + i * capacity_ * row_bytes(), nullptr};
  }

  std::array<std::int64_t, 2> lent_dims() const { return {capacity_, row_bytes()}; }

  ffi::DataType type() const { return rows_.type; }
  std::int64_t row_bytes() const { return hidden_ * rows_.byte_width(); }
  std::int64_t choices_per_rank() const { return num_tokens_ * num_topk_; }
  std::int64_t num_tokens() const { return num_tokens_; }
  // Elements over all stacked ranks.
  std::int64_t choices() const { return stack_ * choices_per_rank(); }
  std::int64_t token_elements() const { return stack_ * num_tokens_ * hidden_; }

 private:
  std::int64_t num_local_;
  std::int64_t capacity_;
  std::int64_t num_topk_;
  std::int64_t num_tokens_;
  Tensor rows_;
  std::int64_t hidden_ = 0;
  std::int64_t stack_ = 0;
  const std::int32_t* topk_idx_ = nullptr;
  const std::int32_t* send_row_ = nullptr;
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_BIND_TOKEN_ROWS_H_
