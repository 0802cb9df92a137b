#include "cpu/row_dots.h"

#include <array>
#include <cstdint>

#include "bind/call_reader.h"
#include "bind/exchange.h"
#include "bind/token_rows.h"

namespace jax_ep {
namespace {

class RowDotsOp {
 public:
  using Args = RowDotsArgs;

  explicit RowDotsOp(CallReader& reader)
      : rows_(reader, [&](const TokenRows& rows) {
          dout_ = static_cast<const char*>(
              reader.Operand<void>("dout", rows.type(), rows.token_elements()));
        }) {
    if (reader.failed()) return;
    dots_ = reader.Result<float>("dots", ffi::DataType::F32, rows_.choices());
  }

  Args At(std::int64_t i) const {
    Args args = {};
    rows_.FillArgs(i, args);
    args.dout = dout_ + i * rows_.num_tokens() * rows_.row_bytes();
    args.dots = dots_ + i * rows_.choices_per_rank();
    return args;
  }

  Lent LentAt(std::int64_t i, const Args& /*args*/) const { return rows_.LentAt(i); }

  static void SetPeers(Args& args, const PeerTables& tables) { args.rows = tables[0]; }

  static Work MakeWork(const Args& args) { return RowDotsWork(args); }

  const char* name() const { return "gradient of combine in its weights"; }

  std::array<std::int64_t, 2> lent_dims() const { return rows_.lent_dims(); }

 private:
  const char* dout_ = nullptr;  // set while rows_ is read
  TokenRows rows_;
  float* dots_ = nullptr;
};

}  // namespace
}  // namespace jax_ep

EP_DEFINE_EXCHANGE(row_dots, jax_ep::RowDotsOp,
                   jax_ep::ExchangeStacked<jax_ep::RowDotsOp>);
