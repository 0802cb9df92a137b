// One more fabric, as a file of ffi/bind would add it, and what the library says of its
// handlers.
#include "bind/handler_list.h"

#include <string>

#include "bind/ops.h"
#include "check.h"

extern "C" const char* jax_ep_handlers();

namespace jax_ep {
namespace {

template <typename Op>
ffi::Error Refuse(ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary) {
  return ffi::Error(ffi::ErrorCode::kUnimplemented, "jax_ep: nobody is served here");
}

template <typename Op>
typename Op::Call ReadCall(CallReader& reader) {
  reader.List("members");
  reader.Operand<std::int32_t>("ticket", 1);
  typename Op::Call call = Op::Read(reader);
  reader.Result<float>("receipt", 1);
  return call;
}

}  // namespace
}  // namespace jax_ep

#define EP_DEFINE_NOWHERE(name, Op)                                   \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                      \
      jax_ep_##name##_nowhere, jax_ep::Refuse<jax_ep::Op>,            \
      xla::ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs()); \
  EP_LIST_HANDLER(name##_nowhere, jax_ep::ReadCall<jax_ep::Op>,       \
                  {"execute", "jax_ep_" #name "_nowhere"})

EP_FOR_EACH_OP(EP_DEFINE_NOWHERE)

namespace jax_ep {
namespace {

void CheckSays(const std::string& part) {
  const std::string all = jax_ep_handlers();
  const Case which(part + "\nin\n" + all);
  EP_CHECK(all.find(part) != std::string::npos);
}

constexpr char kGeometry[] =
    R"("capacity", "members", "num_experts", "num_ranks", "num_tokens", "num_topk", )"
    R"("scope")";
constexpr char kPlan[] =
    R"("group_sizes", "kept", "expert_load", "recv_counts", "num_dropped", "send_rank", )"
    R"("send_row", "recv_choice", "recv_row", "group_rows", "fingerprint")";

EP_TEST(EveryOpHasAHandler) {
#define EP_CHECK_LISTED(name, Op)       \
  CheckSays("\"jax_ep_" #name           \
            "_nowhere\": {\"stages\": " \
            "{\"execute\": \"jax_ep_" #name "_nowhere\"}");
  EP_FOR_EACH_OP(EP_CHECK_LISTED)
}

EP_TEST(OperandsStandInTheOrderInWhichTheyAreRead) {
  CheckSays(std::string(R"("operands": ["rank", "group", "ticket", )") + kPlan +
            R"(, "*x"], "results": ["*rows", "receipt"], "attributes": ["call", )" +
            kGeometry + R"(, "zero_tail"])");
  CheckSays(std::string(R"("operands": ["rank", "group", "ticket", )") + kPlan +
            R"(, "rows", "dout"], "results": ["dots", "receipt"])");
}

EP_TEST(ThePlanReturnsItsArrays) {
  CheckSays(std::string(R"("operands": ["rank", "group", "ticket", "topk_idx"], )") +
            R"("results": [)" + kPlan +
            R"(, "receipt"], "attributes": ["alignment", )");
}

}  // namespace
}  // namespace jax_ep
