// The floats of 8 bits that rows are encoded as, and the scales that go with them.

#ifndef JAX_EP_FFI_COMMON_FLOAT8_H_
#define JAX_EP_FFI_COMMON_FLOAT8_H_

#include <bit>
#include <cstdint>

#include "common/host_device.h"

namespace jax_ep {
// Compiled once per instruction set: see element.h.
namespace {  // NOLINT(google-build-namespaces)

constexpr std::uint32_t kFloatInfinity = 0x7f800000;

struct E4M3 {
  static constexpr int kMantissaBits = 3;
  static constexpr int kLeastExponent = -6;  // of normal numbers
  static constexpr float kMax = 448;
  static constexpr std::uint32_t kNan = 0x7f;
  static constexpr std::uint32_t kInfinity = kNan;  // it has none
};

struct E5M2 {
  static constexpr int kMantissaBits = 2;
  static constexpr int kLeastExponent = -14;
  static constexpr float kMax = 57344;
  static constexpr std::uint32_t kNan = 0x7e;
  static constexpr std::uint32_t kInfinity = 0x7c;
};

// Of ?: a compiler may make branches around the additions before it, and then
// vectorises no loop.
EP_HOST_DEVICE inline std::uint32_t Select(bool condition, std::uint32_t a,
                                           std::uint32_t b) {
  const std::uint32_t mask = -static_cast<std::uint32_t>(condition);
  return (a & mask) | (b & ~mask);
}

// Rounds what does not overflow: to nearest, ties to even.
template <typename F>
EP_HOST_DEVICE inline std::uint8_t RoundFinite(float x) {
  constexpr int kSurplus = 23 - F::kMantissaBits;
  constexpr std::uint32_t kHalf = 1U << (kSurplus - 1);
  constexpr std::uint32_t kFirstNormal = std::uint32_t{127 + F::kLeastExponent} << 23;
  constexpr std::uint32_t kRebias = (kFirstNormal - (1U << 23)) >> kSurplus;
  // Adding this aligns a subnormal's last place with float32's, rounding on the way.
  constexpr std::uint32_t kAligner = kFirstNormal + (std::uint32_t{kSurplus} << 23);
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t magnitude = bits & 0x7fffffff;
  const std::uint32_t odd = (magnitude >> kSurplus) & 1;
  const std::uint32_t normal = ((magnitude + kHalf - 1 + odd) >> kSurplus) - kRebias;
  const float aligned =
      std::bit_cast<float>(magnitude) + std::bit_cast<float>(kAligner);
  const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(aligned) - kAligner;
  const std::uint32_t finite = Select(magnitude < kFirstNormal, subnormal, normal);
  return static_cast<std::uint8_t>(finite | ((bits >> 24) & 0x80));
}

// Likewise, or what is no number.
template <typename F>
EP_HOST_DEVICE inline std::uint8_t RoundTo(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t magnitude = bits & 0x7fffffff;
  const std::uint32_t special =
      Select(magnitude > kFloatInfinity, F::kNan, F::kInfinity) | ((bits >> 24) & 0x80);
  const std::uint32_t code =
      Select(magnitude >= kFloatInfinity, special, RoundFinite<F>(x));
  return static_cast<std::uint8_t>(code);
}

// The bits of |x|, which are in the order of sizes. What is not finite has the largest.
EP_HOST_DEVICE inline std::int32_t SizeOf(float x) {
  return static_cast<std::int32_t>(std::bit_cast<std::uint32_t>(x) & 0x7fffffff);
}
EP_HOST_DEVICE inline bool IsFinite(std::int32_t size) {
  return size < static_cast<std::int32_t>(kFloatInfinity);
}

// The scale of a block whose largest finite size has these bits.
template <typename F>
EP_HOST_DEVICE inline float ScaleOf(std::int32_t largest, bool power_of_two) {
  constexpr float kLeast = F::kMax * 0x1p-100F;
  const float size = std::bit_cast<float>(largest);
  const float scale = (size > kLeast ? size : kLeast) / F::kMax;
  if (!power_of_two) return scale;
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(scale);
  return std::bit_cast<float>((bits + 0x7fffff) & kFloatInfinity);
}

}  // namespace
}  // namespace jax_ep

#endif  // JAX_EP_FFI_COMMON_FLOAT8_H_
