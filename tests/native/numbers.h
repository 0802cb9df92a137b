// Numbers of each dtype, written and read one by one, for tests of arithmetic.

#ifndef JAX_EP_TESTS_NATIVE_NUMBERS_H_
#define JAX_EP_TESTS_NATIVE_NUMBERS_H_

#include <cstdint>
#include <random>
#include <vector>

#include "common/dtype.h"

namespace jax_ep {

// A 16-bit float with a sign, taken from its definition: all arithmetic is in double,
// where every value of it, and every midpoint of two, is exact.
struct SmallFloat {
  int exponent_bits;
  int mantissa_bits;

  double Decode(std::uint16_t code) const;
  // To nearest, ties to even; a NaN becomes some quiet NaN of the same sign.
  std::uint16_t Encode(double value) const;

  int min_exponent() const { return 2 - (1 << (exponent_bits - 1)); }
  int infinity() const { return ((1 << exponent_bits) - 1) << mantissa_bits; }
};

inline constexpr SmallFloat kSmallBF16 = {.exponent_bits = 8, .mantissa_bits = 7};
inline constexpr SmallFloat kSmallF16 = {.exponent_bits = 5, .mantissa_bits = 10};

inline constexpr DType kAllDTypes[] = {DType::kBF16, DType::kF16, DType::kF32,
                                       DType::kF64};

const char* Name(DType dtype);

// Element i of an array of dtype, exactly; and its rounding to dtype.
double LoadNumber(DType dtype, const void* data, std::int64_t i);
void StoreNumber(DType dtype, void* data, std::int64_t i, double value);
double Rounded(DType dtype, double value);

// Whether two numbers have the same bits; all NaNs count as one.
bool SameNumber(double a, double b);

// Rows of numbers that a test looks at one by one. Of exact size, so that
// AddressSanitizer sees what is read beside them.
class Numbers {
 public:
  Numbers(DType dtype, std::int64_t size);

  DType dtype() const { return dtype_; }
  std::int64_t size() const { return size_; }
  void* at(std::int64_t i) { return bytes_.data() + i * ByteWidth(dtype_); }
  const void* at(std::int64_t i) const { return bytes_.data() + i * ByteWidth(dtype_); }
  double operator[](std::int64_t i) const { return LoadNumber(dtype_, at(0), i); }
  void Set(std::int64_t i, double value) { StoreNumber(dtype_, at(0), i, value); }
  void Fill(double value);
  // Values of many sizes, subnormals and zeros of both signs among them; not NaN.
  void FillRandomly(std::mt19937_64& rng);

 private:
  DType dtype_;
  std::int64_t size_;
  std::vector<char> bytes_;
};

// A summand of a reference sum: where its row starts, as ReduceTerm.
struct Summand {
  const Numbers* rows;
  std::int64_t start;
  float weight;
  std::int32_t rank;
};

// The weighted sum of element i of the summands' rows, which come in ascending rank:
// per rank a chain of fma, rounded to dtype; per node these partial sums added, and
// rounded to dtype; then the nodes' likewise.
double ReferenceSum(DType dtype, const std::vector<Summand>& summands, std::int64_t i,
                    std::int64_t ranks_per_node = 1);

// The product of element i, rounded once in the type that sums are in and once to
// dtype.
double ReferenceProduct(DType dtype, float weight, double value);

// 64 sums by fma, the j-th of every 64th product from the j-th on, folded in halves.
float ReferenceDot(const Numbers& a, std::int64_t a_start, const Numbers& b,
                   std::int64_t b_start, std::int64_t size);

}  // namespace jax_ep

#endif  // JAX_EP_TESTS_NATIVE_NUMBERS_H_
