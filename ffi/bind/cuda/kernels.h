// The kernels for GPUs, op by op, as the handlers of every fabric launch them.
#ifndef JAX_EP_FFI_BIND_CUDA_KERNELS_H_
#define JAX_EP_FFI_BIND_CUDA_KERNELS_H_

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "bind/call_reader.h"
#include "bind/ops.h"
#include "cuda/gather_rows.h"
#include "cuda/gather_scaled.h"
#include "cuda/plan.h"
#include "cuda/reduce_rows.h"
#include "cuda/row_dots.h"
#include "fabric/gpus/cuda_says.h"
#include "xla/ffi/api/ffi.h"

namespace jax_ep {

inline cudaError_t LaunchKernel(const GatherRowsArgs& args, std::int64_t num_stacked,
                                cudaStream_t stream) {
  return (args.scaled ? cuda::GatherScaled : cuda::GatherRows)(args, num_stacked,
                                                               stream);
}

inline cudaError_t LaunchKernel(const ReduceRowsArgs& args, std::int64_t num_stacked,
                                cudaStream_t stream) {
  return cuda::ReduceRows(args, num_stacked, stream);
}

inline cudaError_t LaunchKernel(const RowDotsArgs& args, std::int64_t num_stacked,
                                cudaStream_t stream) {
  return cuda::RowDots(args, num_stacked, stream);
}

// Puts a call's kernels for `num_stacked` ranks on the stream.
template <typename KernelArgs>
cudaError_t LaunchKernels(const PlannedCall<KernelArgs>& call, std::int64_t num_stacked,
                          cudaStream_t stream) {
  for (const KernelArgs& args : call.kernels) {
    const cudaError_t error = LaunchKernel(args, num_stacked, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// Plans as GPUs make them: each rank that the call holds its own, from the choices of
// all, in a workspace that XLA hands the handler as one more result.
struct GpuPlanOp {
  struct Call {
    PlanArgs args;  // without outputs
    PlanArrays own;
    const std::int32_t* ranks;  // [num_stacked], where the GPU reads them
    std::int32_t* workspace;
  };
  static Call Read(CallReader& reader) {
    const PlanOp::Call plan = PlanOp::Read(reader);
    const std::int64_t words = reader.failed() ? 0 : cuda::PlanWorkspace(plan.args);
    return {.args = plan.args,
            .own = plan.own,
            .ranks = reader.where().rank,
            .workspace = reader.Result<std::int32_t>("workspace", words)};
  }
  static std::vector<LentRows> LentBy(const Call& call) {
    return {{.data = call.args.topk_idx[0],
             .num_rows = call.args.num_tokens,
             .row_bytes =
                 call.args.num_topk * static_cast<std::int64_t>(sizeof(std::int32_t))}};
  }
  static void SetPeers(Call& call, Tables tables) { call.args.topk_idx = tables[0]; }
};

inline cudaError_t LaunchKernels(const GpuPlanOp::Call& call, std::int64_t num_stacked,
                                 cudaStream_t stream) {
  return cuda::MakePlans(call.args, call.own,
                         {.ranks = call.ranks, .num_stacked = num_stacked},
                         call.workspace, stream);
}

inline ffi::Error CudaError(cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal("jax_ep: " + CudaSays(error));
}

}  // namespace jax_ep

// Expands X(name, Op) for every op as GPUs carry it out.
#define EP_FOR_EACH_GPU_OP(X) \
  X(plan, GpuPlanOp)          \
  EP_FOR_EACH_PLANNED_OP(X)

#endif  // JAX_EP_FFI_BIND_CUDA_KERNELS_H_
