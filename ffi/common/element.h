// How each dtype is read and rounded. GPUs have instructions of their own for some of
// it (cuda/elements.h), whose results are equal, NaN payloads apart.

#ifndef JAX_EP_FFI_COMMON_ELEMENT_H_
#define JAX_EP_FFI_COMMON_ELEMENT_H_

#include <bit>
#include <cstdint>

#include "common/host_device.h"

namespace jax_ep {
// This header is compiled once per instruction set. With external linkage the linker
// would keep one copy of each function, perhaps the one that this CPU cannot run.
namespace {  // NOLINT(google-build-namespaces)

// How each dtype is stored, what it is summed in, and how a sum is rounded back: to
// nearest, ties to even. RoundSum(x) is Load(Round(x)). Branch-free, so that loops over
// them vectorise.

struct F32 {
  using Storage = float;
  using Sum = float;
  EP_HOST_DEVICE static float Load(float x) { return x; }
  EP_HOST_DEVICE static float Round(float x) { return x; }
  EP_HOST_DEVICE static float RoundSum(float x) { return x; }
};

struct F64 {
  using Storage = double;
  using Sum = double;
  EP_HOST_DEVICE static double Load(double x) { return x; }
  EP_HOST_DEVICE static double Round(double x) { return x; }
  EP_HOST_DEVICE static double RoundSum(double x) { return x; }
};

struct BF16 {
  using Storage = std::uint16_t;
  using Sum = float;
  EP_HOST_DEVICE static float Load(std::uint16_t x) {
    return std::bit_cast<float>(static_cast<std::uint32_t>(x) << 16);
  }
  EP_HOST_DEVICE static std::uint16_t Round(float x) {
    return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(RoundSum(x)) >> 16);
  }
  EP_HOST_DEVICE static float RoundSum(float x) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
    const std::uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const std::uint32_t quiet_nan = bits | 0x400000;
    return std::bit_cast<float>((x == x ? rounded : quiet_nan) & 0xffff0000);
  }
};

struct F16 {
  using Storage = std::uint16_t;
  using Sum = float;
  EP_HOST_DEVICE static float Load(std::uint16_t x) {
    constexpr std::uint32_t kInfinity = 0x7c00U << 13;
    const std::uint32_t magnitude = (x & 0x7fffU) << 13;
    const std::uint32_t exponent = magnitude & kInfinity;
    // The exponent's bias moves from 15 to 127, and an infinite one to the top.
    const std::uint32_t normal = magnitude + (112U << 23);
    const std::uint32_t special = normal + (112U << 23);
    // A subnormal gets the implicit bit, which the subtraction takes away again.
    const float subnormal = std::bit_cast<float>(normal + (1U << 23)) - 0x1p-14F;
    const std::uint32_t finite =
        exponent == 0 ? std::bit_cast<std::uint32_t>(subnormal) : normal;
    const std::uint32_t bits = exponent == kInfinity ? special : finite;
    return std::bit_cast<float>(bits | ((x & 0x8000U) << 16));
  }
  EP_HOST_DEVICE static std::uint16_t Round(float x) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
    const std::uint32_t magnitude = bits & 0x7fffffff;
    const std::uint32_t odd = (magnitude >> 13) & 1;
    const std::uint32_t normal = (magnitude - (112U << 23) + 0xfff + odd) >> 13;
    // Adding 0.5 aligns a subnormal's last place with float32's, rounding on the way.
    const float aligned = std::bit_cast<float>(magnitude) + 0.5F;
    const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(aligned) - 0x3f000000;
    const std::uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
    const std::uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    const std::uint32_t half = magnitude >= 0x47800000 ? special : finite;
    return static_cast<std::uint16_t>(half | ((bits >> 16) & 0x8000));
  }
  EP_HOST_DEVICE static float RoundSum(float x) { return Load(Round(x)); }
};

}  // namespace
}  // namespace jax_ep

#endif  // JAX_EP_FFI_COMMON_ELEMENT_H_
