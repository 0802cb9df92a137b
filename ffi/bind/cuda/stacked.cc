// The fabric of ranks that are all on one GPU, stacked along a leading axis: one launch
// serves them all, and nobody waits.
#include <cuda_runtime.h>

#include "bind/cuda/kernels.h"
#include "bind/handler_list.h"
#include "bind/ops.h"

namespace jax_ep {
namespace {

template <typename Op>
typename Op::Call ReadAll(CallReader& reader) {
  typename Op::Call call = Op::Read(reader);
  reader.Require(reader.where().num_stacked == reader.where().num_ranks, "all ranks");
  return call;
}

template <typename Op>
ffi::Error ExchangeStacked(cudaStream_t stream, ffi::RemainingArgs operands,
                           ffi::RemainingRets results, ffi::Dictionary attributes) {
  CallReader reader(operands, results, attributes);
  const auto call = ReadAll<Op>(reader);
  if (reader.failed()) return reader.error();
  return CudaError(LaunchKernels(call, reader.where().num_stacked, stream));
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
  EP_LIST_HANDLER(name##_stacked, jax_ep::ReadAll<jax_ep::Op>,                     \
                  {"execute", "jax_ep_" #name "_stacked"})

EP_FOR_EACH_GPU_OP(EP_DEFINE_STACKED)
