// Implements numbers.h, sharing nothing with what it tests.
#include "numbers.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace jax_ep {
namespace {

template <typename T>
T Element(const void* data, std::int64_t i) {
  T value;
  const auto size = static_cast<std::int64_t>(sizeof(T));
  std::memcpy(&value, static_cast<const char*>(data) + i * size, sizeof(T));
  return value;
}

template <typename T>
void SetElement(void* data, std::int64_t i, T value) {
  const auto size = static_cast<std::int64_t>(sizeof(T));
  std::memcpy(static_cast<char*>(data) + i * size, &value, sizeof(T));
}

const SmallFloat& SmallFloatOf(DType dtype) {
  return dtype == DType::kBF16 ? kSmallBF16 : kSmallF16;
}

// The sums of what stands in ascending order of `of`, for each such number: `add` adds
// a run of such terms, from one index to another.
template <typename Sum, typename Of, typename Add>
Sum SumOfRuns(DType dtype, std::size_t begin, std::size_t end, Of of, Add add) {
  Sum total = 0;
  while (begin < end) {
    std::size_t next = begin;
    while (next < end && of(next) == of(begin)) ++next;
    const Sum sum = add(begin, next);
    total += static_cast<Sum>(Rounded(dtype, static_cast<double>(sum)));
    begin = next;
  }
  return total;
}

template <typename Sum>
double SumIn(DType dtype, const std::vector<Summand>& summands, std::int64_t i,
             std::int64_t ranks_per_node) {
  const auto rank = [&](std::size_t j) { return summands[j].rank; };
  const auto node = [&](std::size_t j) { return summands[j].rank / ranks_per_node; };
  const auto of_rank = [&](std::size_t begin, std::size_t end) {
    Sum partial = 0;
    for (std::size_t j = begin; j < end; ++j) {
      const Summand& term = summands[j];
      const auto value = static_cast<Sum>((*term.rows)[term.start + i]);
      partial = std::fma(static_cast<Sum>(term.weight), value, partial);
    }
    return partial;
  };
  const auto of_node = [&](std::size_t begin, std::size_t end) {
    return SumOfRuns<Sum>(dtype, begin, end, rank, of_rank);
  };
  const Sum total = SumOfRuns<Sum>(dtype, 0, summands.size(), node, of_node);
  return Rounded(dtype, static_cast<double>(total));
}

template <typename Sum>
float DotIn(const Numbers& a, std::int64_t a_start, const Numbers& b,
            std::int64_t b_start, std::int64_t size) {
  std::array<Sum, 64> sums{};
  for (std::int64_t i = 0; i < size; ++i) {
    Sum& sum = sums[static_cast<std::size_t>(i % 64)];
    sum = std::fma(static_cast<Sum>(a[a_start + i]), static_cast<Sum>(b[b_start + i]),
                   sum);
  }
  for (std::size_t half = 32; half > 0; half /= 2) {
    for (std::size_t j = 0; j < half; ++j) sums[j] = sums[j] + sums[j + half];
  }
  return static_cast<float>(sums[0]);
}

}  // namespace

double SmallFloat::Decode(std::uint16_t code) const {
  const int magnitude = code & 0x7fff;
  const double sign = (code & 0x8000) != 0 ? -1.0 : 1.0;
  const int exponent = magnitude >> mantissa_bits;
  const int mantissa = magnitude & ((1 << mantissa_bits) - 1);
  if (magnitude > infinity()) {
    return std::copysign(std::numeric_limits<double>::quiet_NaN(), sign);
  }
  if (magnitude == infinity()) return sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * std::ldexp(mantissa, min_exponent() - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits),
                           min_exponent() - mantissa_bits + exponent - 1);
}

std::uint16_t SmallFloat::Encode(double value) const {
  const int sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return static_cast<std::uint16_t>(sign | 0x7fff);
  const double magnitude = std::fabs(value);
  if (std::isinf(magnitude)) return static_cast<std::uint16_t>(sign | infinity());
  const int exponent =
      magnitude == 0 ? min_exponent() : std::max(std::ilogb(magnitude), min_exponent());
  // Codes count units of the last place; a unit doubles with each exponent.
  const double units = std::nearbyint(std::ldexp(magnitude, mantissa_bits - exponent));
  if (exponent > 2 * (1 << exponent_bits)) {
    return static_cast<std::uint16_t>(sign | infinity());
  }
  const int code =
      static_cast<int>(units) + ((exponent - min_exponent()) << mantissa_bits);
  return static_cast<std::uint16_t>(sign | std::min(code, infinity()));
}

const char* Name(DType dtype) {
  constexpr std::array kNames = {"bf16", "f16", "f32", "f64"};
  return kNames[static_cast<std::size_t>(dtype)];
}

double LoadNumber(DType dtype, const void* data, std::int64_t i) {
  switch (dtype) {
    case DType::kF32:
      return static_cast<double>(Element<float>(data, i));
    case DType::kF64:
      return Element<double>(data, i);
    default:
      return SmallFloatOf(dtype).Decode(Element<std::uint16_t>(data, i));
  }
}

void StoreNumber(DType dtype, void* data, std::int64_t i, double value) {
  switch (dtype) {
    case DType::kF32:
      return SetElement(data, i, static_cast<float>(value));
    case DType::kF64:
      return SetElement(data, i, value);
    default:
      return SetElement(data, i, SmallFloatOf(dtype).Encode(value));
  }
}

double Rounded(DType dtype, double value) {
  double stored = 0;
  StoreNumber(dtype, &stored, 0, value);
  return LoadNumber(dtype, &stored, 0);
}

bool SameNumber(double a, double b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return std::bit_cast<std::uint64_t>(a) == std::bit_cast<std::uint64_t>(b);
}

Numbers::Numbers(DType dtype, std::int64_t size)
    : dtype_(dtype),
      size_(size),
      bytes_(static_cast<std::size_t>(size * ByteWidth(dtype))) {}

void Numbers::Fill(double value) {
  for (std::int64_t i = 0; i < size_; ++i) Set(i, value);
}

void Numbers::FillRandomly(std::mt19937_64& rng) {
  std::normal_distribution<double> common(0, 1);
  std::uniform_int_distribution<int> one_in(0, 31);
  std::uniform_int_distribution<int> small_exponent(-160, -1);
  for (std::int64_t i = 0; i < size_; ++i) {
    const int kind = one_in(rng);
    const double value = common(rng);
    if (kind == 0) {
      Set(i, std::copysign(0.0, value));
    } else if (kind < 5) {
      Set(i, std::ldexp(value, small_exponent(rng)));
    } else {
      Set(i, value);
    }
  }
}

double ReferenceSum(DType dtype, const std::vector<Summand>& summands, std::int64_t i,
                    std::int64_t ranks_per_node) {
  return dtype == DType::kF64 ? SumIn<double>(dtype, summands, i, ranks_per_node)
                              : SumIn<float>(dtype, summands, i, ranks_per_node);
}

double ReferenceProduct(DType dtype, float weight, double value) {
  if (dtype == DType::kF64) return static_cast<double>(weight) * value;
  return Rounded(dtype, static_cast<double>(weight * static_cast<float>(value)));
}

float ReferenceDot(const Numbers& a, std::int64_t a_start, const Numbers& b,
                   std::int64_t b_start, std::int64_t size) {
  return a.dtype() == DType::kF64 ? DotIn<double>(a, a_start, b, b_start, size)
                                  : DotIn<float>(a, a_start, b, b_start, size);
}

}  // namespace jax_ep
