// How callers tell the kernels that compute what rows consist of.

#ifndef JAX_EP_FFI_COMMON_DTYPE_H_
#define JAX_EP_FFI_COMMON_DTYPE_H_

#include <cstdint>

#include "common/host_device.h"

namespace jax_ep {

// Element types that kernels compute with. Plain copies only need the size in bytes.
enum class DType : std::uint8_t { kBF16, kF16, kF32, kF64 };

EP_HOST_DEVICE constexpr std::int64_t ByteWidth(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
    case DType::kF16:
      return 2;
    case DType::kF32:
      return 4;
    case DType::kF64:
      return 8;
  }
  return 0;
}

}  // namespace jax_ep

#endif  // JAX_EP_FFI_COMMON_DTYPE_H_
