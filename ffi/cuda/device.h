// What all kernels do on the device: tell threads apart, add up in a warp, load what
// peers wrote.

#ifndef JAX_EP_FFI_CUDA_DEVICE_H_
#define JAX_EP_FFI_CUDA_DEVICE_H_

#include <cuda_runtime.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>

#include "cuda/launch.h"
#include "cuda/ptx.h"

namespace jax_ep::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffU;

__device__ inline int Lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ inline int WarpInBlock() {
  return static_cast<int>(threadIdx.x) / kWarpSize;
}

// A warp among those of all blocks of LaunchStacked that work for one rank.
__device__ inline std::int64_t WarpOfRank() {
  return static_cast<std::int64_t>(blockIdx.y) * kWarps + WarpInBlock();
}
__device__ inline std::int64_t WarpsOfRank() {
  return static_cast<std::int64_t>(gridDim.y) * kWarps;
}

__device__ inline std::int64_t WarpSum(std::int64_t value) {
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, lanes);
  }
  return value;
}

// The sum over this lane and those below.
__device__ inline std::int64_t WarpScan(std::int64_t value) {
  for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
    const std::int64_t below = __shfl_up_sync(kAllLanes, value, lanes);
    if (Lane() >= lanes) value += below;
  }
  return value;
}

// The sum of `count` numbers, by one warp.
__device__ inline std::int64_t WarpTotal(const std::int32_t* numbers,
                                         std::int64_t count) {
  std::int64_t sum = 0;
#pragma unroll 4
  for (std::int64_t i = Lane(); i < count; i += kWarpSize) sum += numbers[i];
  return WarpSum(sum);
}

#if defined(__CUDA_ARCH__)
// Loads so many bytes at once, past the first-level cache.
template <std::size_t bytes>
__device__ inline auto LoadBytes(const void* p) {
  if constexpr (bytes == 16) {
    return ptx::LoadPastL1V4U32(p);
  } else if constexpr (bytes == 8) {
    return ptx::LoadPastL1U64(p);
  } else if constexpr (bytes == 4) {
    return ptx::LoadPastL1U32(p);
  } else if constexpr (bytes == 2) {
    return ptx::LoadPastL1U16(p);
  } else {
    static_assert(bytes == 1);
    return ptx::LoadPastL1U8(p);
  }
}
#endif

// Reads what a peer wrote before this kernel began. Never by the read-only path, which
// may hold what stood there before; and past the first-level cache, as nobody reads it
// here again.
template <typename Unit>
__device__ inline Unit LoadPeer(const Unit* p) {
#if defined(__CUDA_ARCH__)
  const auto loaded = LoadBytes<sizeof(Unit)>(p);
  Unit unit;
  static_assert(sizeof(unit) == sizeof(loaded));
  __builtin_memcpy(&unit, &loaded, sizeof(unit));
  return unit;
#else
  return *p;
#endif
}

// Writes a part of a row that this kernel does not read again. It is the first to leave
// the second-level cache, and so does not drive out what others are about to read.
template <typename Unit>
__device__ inline void StoreToRow(Unit* p, const Unit& unit) {
  __stcs(p, unit);
}

// Nanoseconds of this GPU's clock, which has nothing to do with other GPUs' ones or the
// host's steady one, and steps by up to a microsecond.
__host__ __device__ inline std::int64_t ClockNow() {
#if defined(__CUDA_ARCH__)
  return static_cast<std::int64_t>(ptx::GlobalTimer());
#else
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  return std::chrono::nanoseconds(now).count();
#endif
}

// Writes into memory of the host, which looks there while kernels run.
__host__ __device__ inline void StoreForHost(std::int64_t* p, std::int64_t value) {
#if defined(__CUDA_ARCH__)
  ptx::StoreReleaseSysU64(p, static_cast<std::uint64_t>(value));
#else
  std::atomic_ref(*p).store(value, std::memory_order_release);
#endif
}

// Returns whether all of these are multiples of `bytes`.
template <typename... Addresses>
__host__ __device__ inline bool AreAligned(std::int64_t bytes, Addresses... addresses) {
  return ((addresses % bytes == 0) && ...);
}

}  // namespace jax_ep::cuda

#endif  // JAX_EP_FFI_CUDA_DEVICE_H_
