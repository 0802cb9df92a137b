#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "bind/call_reader.h"
#include "bind/read_calls.h"
#include "cuda/gather_rows.h"
#include "cuda/plan.h"
#include "cuda/reduce_rows.h"
#include "cuda/row_dots.h"

namespace jax_ep {
namespace {

// Reads a call of stacked ranks, and has `run(args)` put its kernels on the stream.
template <typename Read, typename Run>
ffi::Error OnStream(ffi::RemainingArgs operands, ffi::RemainingRets results,
                    ffi::Dictionary attributes, Read read, Run run) {
  CallReader reader(operands, results, attributes);
  const auto args = read(reader);
  if (reader.failed()) return reader.error();
  const cudaError_t error = run(args, reader.where().num_stacked);
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_ep: CUDA says ") +
                              cudaGetErrorString(error));
}

ffi::Error OnPlan(cudaStream_t stream, ffi::RemainingArgs operands,
                  ffi::RemainingRets results, ffi::Dictionary attributes) {
  std::int32_t* workspace = nullptr;
  const auto read = [&](CallReader& reader) {
    const PlanCall call = ReadPlan(reader);
    if (!reader.failed()) {
      workspace = reader.Result<std::int32_t>("workspace", ffi::DataType::S32,
                                              PlanWorkspace(call.args));
    }
    return call;
  };
  return OnStream(operands, results, attributes, read,
                  [&](const PlanCall& call, std::int64_t) {
                    return MakePlans(call.args, call.first, workspace, stream);
                  });
}

ffi::Error OnGatherRows(cudaStream_t stream, ffi::RemainingArgs operands,
                        ffi::RemainingRets results, ffi::Dictionary attributes) {
  return OnStream(operands, results, attributes, ReadGatherRows,
                  [&](const GatherRowsArgs& args, std::int64_t stack) {
                    return (args.scaled ? ScaleRows : CopyRows)(args, stack, stream);
                  });
}

ffi::Error OnReduceRows(cudaStream_t stream, ffi::RemainingArgs operands,
                        ffi::RemainingRets results, ffi::Dictionary attributes) {
  return OnStream(operands, results, attributes, ReadReduceRows,
                  [&](const ReduceRowsArgs& args, std::int64_t stack) {
                    return ReduceRows(args, stack, stream);
                  });
}

ffi::Error OnRowDots(cudaStream_t stream, ffi::RemainingArgs operands,
                     ffi::RemainingRets results, ffi::Dictionary attributes) {
  return OnStream(operands, results, attributes, ReadRowDots,
                  [&](const RowDotsArgs& args, std::int64_t stack) {
                    return RowDots(args, stack, stream);
                  });
}

}  // namespace
}  // namespace jax_ep

// Nothing is allocated and nothing is waited for, so that XLA may record the kernels
// into a CUDA graph and replay them.
#define EP_DEFINE_CUDA_HANDLER(name, handler)                                      \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_##name##_stacked, handler,                  \
                                xla::ffi::Ffi::Bind()                              \
                                    .Ctx<xla::ffi::PlatformStream<cudaStream_t>>() \
                                    .RemainingArgs()                               \
                                    .RemainingRets()                               \
                                    .Attrs(),                                      \
                                {xla::ffi::Traits::kCmdBufferCompatible})

EP_DEFINE_CUDA_HANDLER(plan, jax_ep::OnPlan);
EP_DEFINE_CUDA_HANDLER(gather_rows, jax_ep::OnGatherRows);
EP_DEFINE_CUDA_HANDLER(reduce_rows, jax_ep::OnReduceRows);
EP_DEFINE_CUDA_HANDLER(row_dots, jax_ep::OnRowDots);
