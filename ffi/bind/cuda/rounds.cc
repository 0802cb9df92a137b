// The fabric of ranks anywhere, whose rows XLA's collectives carry in rounds: what one
// rank does between them, on one GPU. Nobody waits here.
#include <cuda_runtime.h>

#include <cstdint>

#include "bind/cuda/kernels.h"
#include "bind/handler_list.h"
#include "bind/local_ops.h"

namespace jax_ep {
namespace {

struct LocalGpuPlanOp {
  struct Call {
    LocalPlanOp::Call plan;
    std::int32_t* workspace;
  };
  static Call Read(CallReader& reader) {
    const LocalPlanOp::Call plan = LocalPlanOp::Read(reader);
    const std::int64_t words = reader.failed() ? 0 : cuda::PlanWorkspace(plan.args);
    return {.plan = plan, .workspace = reader.Result<std::int32_t>("workspace", words)};
  }
};

cudaError_t Launch(const LocalGpuPlanOp::Call& call, cudaStream_t stream) {
  return cuda::MakePlans(call.plan.args, call.plan.own,
                         {.ranks = call.plan.rank, .num_stacked = 1}, call.workspace,
                         stream);
}

template <typename KernelArgs>
cudaError_t Launch(const PlannedCall<KernelArgs>& call, cudaStream_t stream) {
  return LaunchKernels(call, 1, stream);
}

template <typename Op>
ffi::Error RunLocally(cudaStream_t stream, ffi::RemainingArgs operands,
                      ffi::RemainingRets results, ffi::Dictionary attributes) {
  CallReader reader(operands, results, attributes);
  const typename Op::Call call = Op::Read(reader);
  if constexpr (requires { call.pieces; }) {
    reader.Require(reader.failed() || call.pieces.size() == 1, "one piece");
  }
  if (reader.failed()) return reader.error();
  return CudaError(Launch(call, stream));
}

}  // namespace
}  // namespace jax_ep

// As on one GPU's stacked ranks, a graph may hold them.
#define EP_DEFINE_ROUNDS(name, Op)                                                 \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_##name##_rounds,                            \
                                jax_ep::RunLocally<jax_ep::Op>,                    \
                                xla::ffi::Ffi::Bind()                              \
                                    .Ctx<xla::ffi::PlatformStream<cudaStream_t>>() \
                                    .RemainingArgs()                               \
                                    .RemainingRets()                               \
                                    .Attrs(),                                      \
                                {xla::ffi::Traits::kCmdBufferCompatible});         \
  EP_LIST_HANDLER(name##_rounds, jax_ep::Op::Read,                                 \
                  {"execute", "jax_ep_" #name "_rounds"})

EP_DEFINE_ROUNDS(plan, LocalGpuPlanOp)
EP_FOR_EACH_LOCAL_OP(EP_DEFINE_ROUNDS)
