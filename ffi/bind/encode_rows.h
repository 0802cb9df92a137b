// How the call is read that encodes rows, on every platform. No ranks take part in it.
#ifndef JAX_EP_FFI_BIND_ENCODE_ROWS_H_
#define JAX_EP_FFI_BIND_ENCODE_ROWS_H_

#include "bind/call_reader.h"
#include "common/encode_rows.h"

namespace jax_ep {

// Of no use once the reader has failed.
EncodeRowsArgs ReadEncodeRows(BufferReader& reader);

}  // namespace jax_ep

#endif  // JAX_EP_FFI_BIND_ENCODE_ROWS_H_
