// The only inline assembly, an instruction a function, for device.h and elements.h.

#ifndef JAX_EP_FFI_CUDA_PTX_H_
#define JAX_EP_FFI_CUDA_PTX_H_

#include <cuda_runtime.h>

#include <cstdint>

#if defined(__CUDA_ARCH__)

namespace jax_ep::cuda::ptx {

// These load without a place in the first-level cache; the suffix says what.

__device__ inline uint4 LoadPastL1V4U32(const void* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

__device__ inline std::uint64_t LoadPastL1U64(const void* p) {
  std::uint64_t v;
  asm volatile("ld.global.L1::no_allocate.u64 %0, [%1];" : "=l"(v) : "l"(p));
  return v;
}

__device__ inline std::uint32_t LoadPastL1U32(const void* p) {
  std::uint32_t v;
  asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

__device__ inline std::uint16_t LoadPastL1U16(const void* p) {
  std::uint16_t v;
  asm volatile("ld.global.L1::no_allocate.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}

__device__ inline std::uint8_t LoadPastL1U8(const void* p) {
  std::uint16_t v;  // there are no registers of 8 bits
  asm volatile("ld.global.L1::no_allocate.u8 %0, [%1];" : "=h"(v) : "l"(p));
  return static_cast<std::uint8_t>(v);
}

// Nanoseconds of the GPU's clock.
__device__ inline std::uint64_t GlobalTimer() {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// Stores what the host may look at meanwhile, behind all that is stored before.
__device__ inline void StoreReleaseSysU64(void* p, std::uint64_t v) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" : : "l"(p), "l"(v) : "memory");
}

// These convert, to nearest, ties to even. A NaN becomes the one of its type.

__device__ inline std::uint16_t RoundToBF16(float x) {
  std::uint16_t rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(x));
  return rounded;
}

__device__ inline std::uint16_t RoundToF16(float x) {
  std::uint16_t rounded;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded) : "f"(x));
  return rounded;
}

__device__ inline float WidenBF16(std::uint16_t x) {
  float widened;
  asm("mov.b32 %0, {0, %1};" : "=f"(widened) : "h"(x));
  return widened;
}

__device__ inline float WidenF16(std::uint16_t x) {
  float widened;
  asm("cvt.f32.f16 %0, %1;" : "=f"(widened) : "h"(x));
  return widened;
}

}  // namespace jax_ep::cuda::ptx

#endif  // defined(__CUDA_ARCH__)

#endif  // JAX_EP_FFI_CUDA_PTX_H_
