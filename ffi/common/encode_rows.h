// What the CPU's and the GPU's encode_rows are told, and their callers fill in.

#ifndef JAX_EP_FFI_COMMON_ENCODE_ROWS_H_
#define JAX_EP_FFI_COMMON_ENCODE_ROWS_H_

#include <cstdint>

#include "common/dtype.h"

namespace jax_ep {

enum class Float8 : std::uint8_t { kE4M3, kE5M2 };

// Rows that are cut into blocks, the last of which may be shorter, become floats of 8
// bits and a scale for each block.
struct EncodeRowsArgs {
  const void* x;       // [num_rows, hidden]
  std::uint8_t* rows;  // [num_rows, hidden]
  float* scales;       // [num_rows, num_blocks]
  std::int64_t num_rows;
  std::int64_t hidden;
  std::int64_t block;
  std::int64_t num_blocks;
  DType dtype;        // of x; not float64
  Float8 to;          // of rows
  bool power_of_two;  // rounds scales up to one
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_COMMON_ENCODE_ROWS_H_
