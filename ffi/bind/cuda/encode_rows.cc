// The handler that encodes rows on a GPU.
#include "bind/encode_rows.h"

#include <cuda_runtime.h>

#include "bind/call_reader.h"
#include "bind/cuda/kernels.h"
#include "bind/handler_list.h"
#include "cuda/encode_rows.h"

namespace jax_ep {
namespace {

ffi::Error EncodeRows(cudaStream_t stream, ffi::RemainingArgs operands,
                      ffi::RemainingRets results, ffi::Dictionary attributes) {
  BufferReader reader(operands, results, attributes);
  const EncodeRowsArgs args = ReadEncodeRows(reader);
  if (reader.failed()) return reader.error();
  return CudaError(cuda::EncodeRows(args, stream));
}

}  // namespace
}  // namespace jax_ep

// As on one GPU's stacked ranks, a graph may hold it.
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_encode_rows, jax_ep::EncodeRows,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs(),
                              {xla::ffi::Traits::kCmdBufferCompatible});

EP_LIST_HANDLER(encode_rows, jax_ep::ReadEncodeRows, {"execute", "jax_ep_encode_rows"})
