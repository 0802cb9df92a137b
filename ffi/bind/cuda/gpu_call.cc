// Implements gpu_call.h.
#include "bind/cuda/gpu_call.h"

#include <cuda_runtime.h>

#include <cstdint>
#include <optional>
#include <string>

#include "cuda/plan.h"

namespace jax_ep {

std::optional<Role> FindRole(CallSite& site, std::int32_t device,
                             const Whereabouts& where, cudaStream_t stream,
                             CallReader& reader) {
  return site.RoleOf(device, [&]() -> std::optional<Role> {
    Role role = {};
    cudaError_t error = cudaMemcpyAsync(&role.rank, where.rank, sizeof(role.rank),
                                        cudaMemcpyDeviceToHost, stream);
    if (error == cudaSuccess) {
      error = cudaMemcpyAsync(&role.group, where.group, sizeof(role.group),
                              cudaMemcpyDeviceToHost, stream);
    }
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
    if (error == cudaSuccess) return role;
    reader.Fail(std::string("CUDA says ") + cudaGetErrorString(error));
    return std::nullopt;
  });
}

ffi::Error ErrorOf(const std::optional<StreamFailure>& failure) {
  if (!failure) return ffi::Error::Success();
  if (failure->is_of_cuda) return ffi::Error::Internal("jax_ep: " + failure->what);
  return MeetingError(failure->what);
}

// XLA has gathered all ranks' choices, so that each makes its own plan of them. The
// members are not looked at: every call of these fabrics has them.
GatheredPlan ReadGatheredPlan(CallReader& reader) {
  reader.List("members");
  const std::int64_t num_ranks = reader.where().num_ranks;
  const std::int64_t choices =
      reader.Attribute("num_tokens") * reader.Attribute("num_topk");
  const auto* gathered = reader.Operand<std::int32_t>("gathered", num_ranks * choices);
  GatheredPlan plan = {.call = PlanOp::Read(reader), .workspace = nullptr};
  const std::int64_t words = reader.failed() ? 0 : cuda::PlanWorkspace(plan.call.args);
  plan.workspace = reader.Result<std::int32_t>("workspace", words);
  plan.call.args.topk_idx =
      PeerTable(gathered, choices * static_cast<std::int64_t>(sizeof(std::int32_t)));
  return plan;
}

ffi::Error PlanGathered(cudaStream_t stream, ffi::RemainingArgs operands,
                        ffi::RemainingRets results, ffi::Dictionary attributes) {
  CallReader reader(operands, results, attributes);
  const GatheredPlan plan = ReadGatheredPlan(reader);
  if (reader.failed()) return reader.error();
  const cuda::PlanRanks ranks = {.ranks = reader.where().rank, .num_stacked = 1};
  return CudaError(
      cuda::MakePlans(plan.call.args, plan.call.own, ranks, plan.workspace, stream));
}

}  // namespace jax_ep
