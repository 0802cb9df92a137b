// The arithmetic of each instruction set, against that of single numbers.
#include "cpu/row_math.h"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "numbers.h"

namespace jax_ep::cpu {

extern const RowMath kRowMathBaseline;
#if defined(__x86_64__)
extern const RowMath kRowMathAvx2;
#endif

namespace {

constexpr std::int64_t kSizes[] = {0,   1,   2,   3,    7,    8,    15,  31,
                                   33,  63,  64,  65,   127,  128,  129, 250,
                                   511, 513, 777, 1023, 1024, 1025, 2051};

// Every table that this CPU runs. All are held to one reference, so they agree.
std::vector<const RowMath*> Tables() {
  std::vector<const RowMath*> tables = {&kRowMathBaseline};
#if defined(__x86_64__)
  if (&BestRowMath() == &kRowMathAvx2) tables.push_back(&kRowMathAvx2);
#endif
  return tables;
}

std::string Which(const RowMath& math, DType dtype, std::int64_t size) {
  return std::string(math.instruction_set) + " " + Name(dtype) + " " + Show(size);
}

// Runs check(table, dtype, size) for all of them.
template <typename Check>
void ForAll(Check check) {
  for (const RowMath* math : Tables()) {
    for (const DType dtype : kAllDTypes) {
      for (const std::int64_t size : kSizes) {
        const Case which(Which(*math, dtype, size));
        check(*math, dtype, size);
      }
    }
  }
}

EP_TEST(BestTableIsTheMostCapable) {
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  EP_CHECK_EQ(std::string(BestRowMath().instruction_set),
              has_avx2 ? "x86-64-v3" : "x86-64");
#else
  EP_CHECK(&BestRowMath() == &kRowMathBaseline);
#endif
}

// Copies from any alignment to any other, and writes nothing else.
void CheckCopy(const RowMath& math, std::int64_t bytes, std::size_t offset,
               bool stream) {
  constexpr std::size_t kGap = 64;
  constexpr std::int64_t kCount = 3;
  const auto size = static_cast<std::size_t>(bytes);
  std::vector<char> src(offset + size);
  for (std::size_t i = 0; i < src.size(); ++i) src[i] = static_cast<char>(i * 7 + 1);
  std::vector<char> out(kCount * (size + 2 * kGap), 'x');
  std::vector<char> want = out;
  std::vector<void*> targets;
  for (std::size_t i = 0; i < kCount; ++i) {
    const std::size_t start = i * (size + 2 * kGap) + (offset * (i + 1)) % kGap;
    targets.push_back(out.data() + start);
    std::copy_n(src.data() + offset, bytes, want.data() + start);
  }
  math.copy(src.data() + offset, targets.data(), kCount, bytes, stream);
  math.fence();
  EP_CHECK(out == want);
}

EP_TEST(CopyMovesBytesOfAnyAlignment) {
  for (const RowMath* math : Tables()) {
    for (std::int64_t bytes = 1; bytes < 300; bytes += bytes < 140 ? 1 : 13) {
      for (const std::size_t offset : {0U, 1U, 3U, 16U, 32U, 47U}) {
        CheckCopy(*math, bytes, offset, false);
        CheckCopy(*math, bytes, offset, true);
      }
    }
    CheckCopy(*math, 70001, 0, true);
    CheckCopy(*math, 70001, 5, true);
  }
}

EP_TEST(ScaleRoundsOnce) {
  std::mt19937_64 rng(2);
  ForAll([&](const RowMath& math, DType dtype, std::int64_t size) {
    Numbers src(dtype, size + 1);
    Numbers dst(dtype, size + 2);
    src.FillRandomly(rng);
    dst.Fill(7);
    const float weight = std::normal_distribution<float>(0, 2)(rng);
    math.scale(dtype, src.at(1), weight, dst.at(1), size);
    for (std::int64_t i = 0; i < size; ++i) {
      const double want = ReferenceProduct(dtype, weight, src[i + 1]);
      EP_CHECK(SameNumber(dst[i + 1], want));
    }
    EP_CHECK_EQ(dst[0], 7);
    EP_CHECK_EQ(dst[size + 1], 7);
  });
}

// Converts each 16-bit code, in the instructions of each table. A NaN stays one.
EP_TEST(ScaleByOneKeepsEveryCode) {
  for (const RowMath* math : Tables()) {
    for (const DType dtype : {DType::kBF16, DType::kF16}) {
      Numbers src(dtype, 0x10000);
      Numbers dst(dtype, 0x10000);
      for (std::int64_t code = 0; code <= 0xffff; ++code) {
        const auto bits = static_cast<std::uint16_t>(code);
        std::memcpy(src.at(code), &bits, sizeof(bits));
      }
      math->scale(dtype, src.at(0), 1.0F, dst.at(0), 0x10000);
      for (std::int64_t code = 0; code <= 0xffff; ++code) {
        EP_CHECK(SameNumber(dst[code], src[code]));
      }
    }
  }
}

// Terms of random ranks, in ascending order; some ranks have several, most have none.
struct RandomTerms {
  RandomTerms(const Numbers& rows, std::int64_t num_terms, std::int32_t per_node,
              std::mt19937_64& rng)
      : ranks_per_node(per_node) {
    std::vector<std::int32_t> ranks;
    for (std::int64_t j = 0; j < num_terms; ++j) {
      ranks.push_back(static_cast<std::int32_t>(rng() % 6));
    }
    std::ranges::sort(ranks);
    for (const std::int32_t rank : ranks) {
      const std::int64_t start = 1 + static_cast<std::int64_t>(rng() % 9);
      const float weight = std::normal_distribution<float>(0, 1)(rng);
      terms.push_back({.row = rows.at(start),
                       .weight = weight,
                       .rank = rank,
                       .node = rank / per_node});
      summands.push_back(
          {.rows = &rows, .start = start, .weight = weight, .rank = rank});
    }
  }
  std::int32_t ranks_per_node;
  std::vector<ReduceTerm> terms;
  std::vector<Summand> summands;
};

void CheckReduce(const RowMath& math, const Numbers& rows, std::int64_t size,
                 const RandomTerms& random) {
  Numbers out(rows.dtype(), size + 2);
  out.Fill(7);
  const auto num_terms = static_cast<std::int64_t>(random.terms.size());
  const void* row_after = num_terms % 2 == 0 ? nullptr : rows.at(3);
  math.reduce(rows.dtype(), random.terms.data(), num_terms, out.at(1), size, row_after);
  for (std::int64_t i = 0; i < size; ++i) {
    const double want =
        ReferenceSum(rows.dtype(), random.summands, i, random.ranks_per_node);
    EP_CHECK(SameNumber(out[i + 1], want));
  }
  EP_CHECK_EQ(out[0], 7);
  EP_CHECK_EQ(out[size + 1], 7);
}

EP_TEST(ReduceRoundsPerRankAndNodeAndAtTheEnd) {
  std::mt19937_64 rng(3);
  ForAll([&](const RowMath& math, DType dtype, std::int64_t size) {
    Numbers rows(dtype, size + 10);
    rows.FillRandomly(rng);
    for (const std::int64_t num_terms : {0, 1, 2, 8}) {
      for (const std::int32_t per_node : {1, 2, 3, 6}) {
        CheckReduce(math, rows, size, RandomTerms(rows, num_terms, per_node, rng));
      }
    }
  });
}

// Rounding per rank is not rounding once: 1 + 2^-8 is 1 in bf16, whatever follows. Nor
// is rounding per node.
EP_TEST(ReduceRoundsEachRanksPart) {
  const float small = 0x1p-8F;
  Numbers ones(DType::kBF16, 1);
  ones.Set(0, 1);
  for (const RowMath* math : Tables()) {
    const auto sum = [&](std::vector<ReduceTerm> terms) {
      Numbers out(DType::kBF16, 1);
      math->reduce(DType::kBF16, terms.data(), static_cast<std::int64_t>(terms.size()),
                   out.at(0), 1, nullptr);
      return out[0];
    };
    const void* row = ones.at(0);
    EP_CHECK_EQ(sum({{row, 1, 0, 0}, {row, small, 0, 0}, {row, small, 1, 1}}), 1);
    EP_CHECK_EQ(sum({{row, 1, 0, 0}, {row, small, 1, 1}, {row, small, 1, 1}}),
                1 + 0x1p-7);
    EP_CHECK_EQ(sum({{row, 1, 0, 0}, {row, small, 1, 0}, {row, small, 2, 1}}), 1);
    EP_CHECK_EQ(sum({{row, 1, 0, 0}, {row, small, 1, 1}, {row, small, 2, 1}}),
                1 + 0x1p-7);
  }
}

EP_TEST(ReducePassesOnInfinityAndNaN) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  for (const RowMath* math : Tables()) {
    for (const DType dtype : kAllDTypes) {
      Numbers rows(dtype, 4);
      rows.Set(1, kInf);
      rows.Set(2, -kInf);
      rows.Set(3, std::numeric_limits<double>::quiet_NaN());
      Numbers out(dtype, 4);
      const ReduceTerm term = {.row = rows.at(0), .weight = 2, .rank = 0, .node = 0};
      math->reduce(dtype, &term, 1, out.at(0), 4, nullptr);
      for (std::int64_t i = 0; i < 4; ++i) EP_CHECK(SameNumber(out[i], rows[i]));
    }
  }
}

EP_TEST(DotSumsIn64Lanes) {
  std::mt19937_64 rng(4);
  ForAll([&](const RowMath& math, DType dtype, std::int64_t size) {
    Numbers a(dtype, size + 1);
    Numbers b(dtype, size + 3);
    a.FillRandomly(rng);
    b.FillRandomly(rng);
    const float got = math.dot(dtype, a.at(1), b.at(3), size);
    const float want = ReferenceDot(a, 1, b, 3, size);
    EP_CHECK_EQ(std::bit_cast<std::uint32_t>(got), std::bit_cast<std::uint32_t>(want));
  });
}

}  // namespace
}  // namespace jax_ep::cpu
