// Rows to be encoded, and what they become: found by search among all numbers of 8
// bits.

#ifndef JAX_EP_TESTS_NATIVE_ENCODING_H_
#define JAX_EP_TESTS_NATIVE_ENCODING_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "common/dtype.h"
#include "common/encode_rows.h"
#include "numbers.h"

namespace jax_ep {

inline constexpr DType kEncodedDTypes[] = {DType::kBF16, DType::kF16, DType::kF32};
inline constexpr Float8 kAllFloat8[] = {Float8::kE4M3, Float8::kE5M2};

inline std::uint8_t NanOf(Float8 to) { return to == Float8::kE4M3 ? 0x7f : 0x7e; }
inline std::uint8_t InfinityOf(Float8 to) { return to == Float8::kE4M3 ? 0x7f : 0x7c; }

// The finite numbers that are not negative, ascending: the code of each is its place.
inline std::vector<double> NumbersOf(Float8 to) {
  const int mantissa_bits = to == Float8::kE4M3 ? 3 : 2;
  const int least_exponent = to == Float8::kE4M3 ? -6 : -14;
  std::vector<double> numbers;
  for (int code = 0; code < InfinityOf(to); ++code) {
    const int exponent = code >> mantissa_bits;
    const int digits = code - ((std::max(exponent, 1) - 1) << mantissa_bits);
    numbers.push_back(
        std::ldexp(digits, least_exponent - mantissa_bits + std::max(exponent, 1) - 1));
  }
  return numbers;
}

inline std::uint8_t Nearest(Float8 to, float x) {
  static const std::vector<double> e4m3 = NumbersOf(Float8::kE4M3);
  static const std::vector<double> e5m2 = NumbersOf(Float8::kE5M2);
  const auto& numbers = to == Float8::kE4M3 ? e4m3 : e5m2;
  const std::size_t sign = std::signbit(x) ? 0x80 : 0;
  if (std::isnan(x)) return static_cast<std::uint8_t>(sign | NanOf(to));
  if (std::isinf(x)) return static_cast<std::uint8_t>(sign | InfinityOf(to));
  const double size = std::fabs(static_cast<double>(x));
  const auto above = std::ranges::lower_bound(numbers, size);
  auto code = static_cast<std::size_t>(above - numbers.begin());
  if (code == numbers.size()) --code;
  if (code > 0) {
    const double down = size - numbers[code - 1];
    const double up = numbers[code] - size;
    if (down < up || (down == up && code % 2 == 1)) --code;
  }
  return static_cast<std::uint8_t>(sign | code);
}

struct EncodedRows {
  std::vector<std::uint8_t> rows;
  std::vector<float> scales;
};

// The smallest power of two that is not below it.
inline float ToPowerOfTwo(float x) {
  int exponent = 0;
  const float digits = std::frexp(x, &exponent);  // in [0.5, 1)
  return std::ldexp(1.0F, digits == 0.5F ? exponent - 1 : exponent);
}

inline EncodedRows ReferenceEncoding(const Numbers& x, const EncodeRowsArgs& args) {
  const float most = args.to == Float8::kE4M3 ? 448 : 57344;
  EncodedRows encoded;
  for (std::int64_t begin = 0; begin < x.size();) {
    const std::int64_t left = args.hidden - begin % args.hidden;
    const std::int64_t end = begin + std::min(left, args.block);
    float largest = most * 0x1p-100F;
    for (std::int64_t i = begin; i < end; ++i) {
      if (std::isfinite(x[i])) {
        largest = std::max(largest, std::fabs(static_cast<float>(x[i])));
      }
    }
    float scale = largest / most;
    if (args.power_of_two) scale = ToPowerOfTwo(scale);
    encoded.scales.push_back(scale);
    const float inverse = 1 / scale;
    for (std::int64_t i = begin; i < end; ++i) {
      const auto one = static_cast<float>(x[i]);
      encoded.rows.push_back(Nearest(args.to, one * inverse));
    }
    begin = end;
  }
  return encoded;
}

inline EncodeRowsArgs ArgsOf(std::int64_t num_rows, std::int64_t hidden,
                             std::int64_t block) {
  EncodeRowsArgs args = {};
  args.num_rows = num_rows;
  args.hidden = hidden;
  args.block = block;
  args.num_blocks = (hidden + block - 1) / block;
  return args;
}

// Calls check(x, args without outputs) for rows of many kinds.
template <typename Check>
void ForEncodings(std::mt19937_64& rng, Check check) {
  for (const DType dtype : kEncodedDTypes) {
    for (const Float8 to : kAllFloat8) {
      for (const bool power_of_two : {false, true}) {
        for (const std::int64_t hidden : {1, 31, 128, 200, 516}) {
          for (const std::int64_t block : {1, 8, 100, 128}) {
            EncodeRowsArgs args = ArgsOf(3, hidden, block);
            args.dtype = dtype;
            args.to = to;
            args.power_of_two = power_of_two;
            const Case which(std::string(Name(dtype)) + " to " +
                             Show(static_cast<int>(to)) + " H=" + Show(hidden) +
                             " block " + Show(block));
            Numbers x(dtype, args.num_rows * hidden);
            x.FillRandomly(rng);
            // In the second row.
            using Limits = std::numeric_limits<double>;
            for (const double special :
                 {Limits::quiet_NaN(), Limits::infinity(), -Limits::infinity(), 0.0}) {
              x.Set(hidden + static_cast<std::int64_t>(
                                 rng() % static_cast<std::uint64_t>(hidden)),
                    special);
            }
            args.x = x.at(0);
            check(x, args);
          }
        }
      }
    }
  }
}

}  // namespace jax_ep

#endif  // JAX_EP_TESTS_NATIVE_ENCODING_H_
