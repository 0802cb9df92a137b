// Implements gpu_call.h.
#include "bind/cuda/gpu_call.h"

#include <cuda_runtime.h>

#include <cstdint>
#include <optional>

#include "fabric/gpus/cuda_says.h"

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
    reader.Fail(CudaSays(error));
    return std::nullopt;
  });
}

ffi::Error ErrorOf(const std::optional<StreamFailure>& failure) {
  if (!failure) return ffi::Error::Success();
  if (failure->is_of_cuda) return ffi::Error::Internal("jax_ep " + failure->what);
  return MeetingError(failure->what);
}

}  // namespace jax_ep
