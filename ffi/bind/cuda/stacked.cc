// The fabric of ranks that are all on one GPU, stacked along a leading axis: one launch
// serves them all, and nobody waits.
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "bind/cuda/kernels.h"
#include "bind/handler_list.h"
#include "bind/ops.h"
#include "cuda/plan.h"

namespace jax_ep {
namespace {

struct StackedPlan {
  PlanOp::Call call;
  const std::int32_t* ranks;  // where the GPU reads them
  std::int32_t* workspace;
};

cudaError_t Run(const StackedPlan& plan, std::int64_t num_stacked,
                cudaStream_t stream) {
  return cuda::MakePlans(plan.call.args, plan.call.own,
                         {.ranks = plan.ranks, .num_stacked = num_stacked},
                         plan.workspace, stream);
}

template <typename KernelArgs>
cudaError_t Run(const PlannedCall<KernelArgs>& call, std::int64_t num_stacked,
                cudaStream_t stream) {
  return LaunchKernels(call, num_stacked, stream);
}

// The plan wants a workspace, which XLA hands it as one more result.
template <typename Op>
auto ReadCall(CallReader& reader) {
  typename Op::Call call = Op::Read(reader);
  reader.Require(reader.where().num_stacked == reader.where().num_ranks, "all ranks");
  if constexpr (std::is_same_v<Op, PlanOp>) {
    const std::int64_t words = reader.failed() ? 0 : cuda::PlanWorkspace(call.args);
    auto* workspace = reader.Result<std::int32_t>("workspace", words);
    return StackedPlan{
        .call = call, .ranks = reader.where().rank, .workspace = workspace};
  } else {
    return call;
  }
}

template <typename Op>
ffi::Error ExchangeStacked(cudaStream_t stream, ffi::RemainingArgs operands,
                           ffi::RemainingRets results, ffi::Dictionary attributes) {
  CallReader reader(operands, results, attributes);
  const auto call = ReadCall<Op>(reader);
  if (reader.failed()) return reader.error();
  return CudaError(Run(call, reader.where().num_stacked, stream));
}

}  // namespace
}  // namespace jax_ep

// Nothing is allocated and nothing is waited for, so that XLA may record the kernels
// into a CUDA graph and replay them.
#define EP_DEFINE_STACKED(name, Op)                                                \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_##name##_stacked,                           \
                                jax_ep::ExchangeStacked<jax_ep::Op>,               \
                                xla::ffi::Ffi::Bind()                              \
                                    .Ctx<xla::ffi::PlatformStream<cudaStream_t>>() \
                                    .RemainingArgs()                               \
                                    .RemainingRets()                               \
                                    .Attrs(),                                      \
                                {xla::ffi::Traits::kCmdBufferCompatible});         \
  EP_LIST_HANDLER(name##_stacked, jax_ep::ReadCall<jax_ep::Op>,                    \
                  {"execute", "jax_ep_" #name "_stacked"})

EP_FOR_EACH_OP(EP_DEFINE_STACKED)
