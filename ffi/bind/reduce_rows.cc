#include "cpu/reduce_rows.h"

#include <array>
#include <cstdint>

#include "bind/call_reader.h"
#include "bind/exchange.h"
#include "bind/token_rows.h"

namespace jax_ep {
namespace {

class ReduceRowsOp {
 public:
  using Args = ReduceRowsArgs;

  explicit ReduceRowsOp(CallReader& reader)
      : rows_(reader, [&](const TokenRows& rows) {
          const Tensor weights = reader.Operand("weights", 1);
          if (reader.failed() || weights.elements() == 0) return;
          reader.Require(weights.type == ffi::DataType::F32 &&
                             weights.elements() == rows.choices(),
                         "weights [.., T, K]");
          weights_ = static_cast<const float*>(weights.data);
        }) {
    if (reader.failed()) return;
    out_ = static_cast<char*>(
        reader.Result<void>("out", rows_.type(), rows_.token_elements()));
  }

  Args At(std::int64_t i) const {
    Args args = {};
    rows_.FillArgs(i, args);
    if (weights_ != nullptr) args.weights = weights_ + i * rows_.choices_per_rank();
    args.out = out_ + i * rows_.num_tokens() * rows_.row_bytes();
    return args;
  }

  Lent LentAt(std::int64_t i, const Args& /*args*/) const { return rows_.LentAt(i); }

  static void SetPeers(Args& args, const PeerTables& tables) { args.rows = tables[0]; }

  static Work MakeWork(const Args& args) { return ReduceRowsWork(args); }

  const char* name() const {
    return weights_ != nullptr ? "combine" : "combine with unit weights";
  }

  std::array<std::int64_t, 2> lent_dims() const { return rows_.lent_dims(); }

 private:
  const float* weights_ = nullptr;  // set while rows_ is read
  TokenRows rows_;
  char* out_ = nullptr;
};

}  // namespace
}  // namespace jax_ep

EP_DEFINE_EXCHANGE(reduce_rows, jax_ep::ReduceRowsOp,
                   jax_ep::ExchangeStacked<jax_ep::ReduceRowsOp>);
