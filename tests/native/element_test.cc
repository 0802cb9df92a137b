// How numbers of each dtype are read and rounded, over all or many of their bits.
#include "common/element.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>

#include "check.h"
#include "numbers.h"

namespace jax_ep {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

template <typename E>
void CheckRound(const SmallFloat& format, float value) {
  const std::uint16_t got = E::Round(value);
  const std::uint16_t want = format.Encode(static_cast<double>(value));
  const Case which("value " + Show(std::bit_cast<std::uint32_t>(value)));
  if (std::isnan(value)) {
    EP_CHECK((got & 0x7fff) > format.infinity());
    EP_CHECK((got & (1 << (format.mantissa_bits - 1))) != 0);
    EP_CHECK_EQ(got >> 15, want >> 15);
  } else {
    EP_CHECK_EQ(got, want);
  }
}

template <typename E>
void CheckRoundAround(const SmallFloat& format, float value) {
  CheckRound<E>(format, value);
  CheckRound<E>(format, std::nextafter(value, kInf));
  CheckRound<E>(format, std::nextafter(value, -kInf));
}

template <typename E>
void CheckLoadOfAll(const SmallFloat& format) {
  for (int code = 0; code <= 0xffff; ++code) {
    const Case which("code " + Show(code));
    const float got = E::Load(static_cast<std::uint16_t>(code));
    const double want = format.Decode(static_cast<std::uint16_t>(code));
    EP_CHECK(SameNumber(static_cast<double>(got), want));
    EP_CHECK_EQ(std::signbit(got), (code & 0x8000) != 0);
  }
}

// Where rounding changes its mind: at each value, at each midpoint of two, and just
// beside them.
template <typename E>
void CheckRoundAtAllBorders(const SmallFloat& format) {
  for (int code = 0; code < format.infinity(); ++code) {
    const double value = format.Decode(static_cast<std::uint16_t>(code));
    const double unit = value - format.Decode(static_cast<std::uint16_t>(code - 1));
    const double next = code + 1 == format.infinity()
                            ? value + unit
                            : format.Decode(static_cast<std::uint16_t>(code + 1));
    for (const double sign : {1.0, -1.0}) {
      CheckRoundAround<E>(format, static_cast<float>(sign * value));
      CheckRoundAround<E>(format, static_cast<float>(sign * (value + next) / 2));
    }
  }
}

template <typename E>
void CheckRoundOfAnything(const SmallFloat& format) {
  std::mt19937 rng(1);
  for (int i = 0; i < 500000; ++i) {
    CheckRound<E>(format, std::bit_cast<float>(static_cast<std::uint32_t>(rng())));
  }
  using Limits = std::numeric_limits<float>;
  for (const float value : {0.0F, kInf, Limits::max(), Limits::min(),
                            Limits::denorm_min(), Limits::quiet_NaN()}) {
    CheckRound<E>(format, value);
    CheckRound<E>(format, -value);
  }
  // NaNs whose payload is all in the bits that rounding cuts off, or carries out of.
  for (const std::uint32_t bits :
       {0x7f800001U, 0xff800001U, 0x7fffffffU, 0xffffffffU}) {
    CheckRound<E>(format, std::bit_cast<float>(bits));
  }
}

EP_TEST(BF16LoadsEveryCode) { CheckLoadOfAll<BF16>(kSmallBF16); }
EP_TEST(F16LoadsEveryCode) { CheckLoadOfAll<F16>(kSmallF16); }
EP_TEST(BF16RoundsToNearestEven) { CheckRoundAtAllBorders<BF16>(kSmallBF16); }
EP_TEST(F16RoundsToNearestEven) { CheckRoundAtAllBorders<F16>(kSmallF16); }
EP_TEST(BF16RoundsAnything) { CheckRoundOfAnything<BF16>(kSmallBF16); }
EP_TEST(F16RoundsAnything) { CheckRoundOfAnything<F16>(kSmallF16); }

}  // namespace
}  // namespace jax_ep
