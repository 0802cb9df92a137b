// Rows encoded by each instruction set, in any order of chunks, against what a search
// among all numbers finds.
#include "cpu/encode_rows.h"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "common/float8.h"
#include "cpu/row_encoding.h"
#include "encoding.h"
#include "run_work.h"

namespace jax_ep {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

template <typename F>
void CheckRound(Float8 to, float x) {
  const Case which("value " + Show(x));
  const std::uint8_t want = Nearest(to, x);
  EP_CHECK_EQ(RoundTo<F>(x), want);
  if (std::isfinite(x)) EP_CHECK_EQ(RoundFinite<F>(x), want);
}

// Where rounding changes its mind: at each number, at each middle of two, and beside
// them.
template <typename F>
void CheckAllBorders(Float8 to) {
  const std::vector<double> numbers = NumbersOf(to);
  EP_CHECK_EQ(numbers.back(), static_cast<double>(F::kMax));
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    const double next = i + 1 < numbers.size() ? numbers[i + 1] : numbers[i];
    for (const double border : {numbers[i], (numbers[i] + next) / 2}) {
      for (const float sign : {1.0F, -1.0F}) {
        const float x = sign * static_cast<float>(border);
        CheckRound<F>(to, x);
        CheckRound<F>(to, std::nextafter(x, kInf));
        CheckRound<F>(to, std::nextafter(x, -kInf));
      }
    }
  }
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const float x : {0.0F, -0.0F, kInf, -kInf, nan, -nan}) CheckRound<F>(to, x);
}

EP_TEST(RoundsToTheNearest) {
  CheckAllBorders<E4M3>(Float8::kE4M3);
  CheckAllBorders<E5M2>(Float8::kE5M2);
}

// All are held to one reference, so they agree.
EP_TEST(EveryInstructionSetEncodesAlike) {
  std::vector<cpu::EncodeLoop*> loops = {cpu::EncodeBaseline};
  if (cpu::BestEncodeLoop() != cpu::EncodeBaseline) {
    loops.push_back(cpu::BestEncodeLoop());
  }
  std::mt19937_64 rng(1);
  ForEncodings(rng, [&](const Numbers& x, EncodeRowsArgs args) {
    const EncodedRows want = ReferenceEncoding(x, args);
    for (cpu::EncodeLoop* encode : loops) {
      EncodedRows got = {.rows = std::vector<std::uint8_t>(want.rows.size()),
                         .scales = std::vector<float>(want.scales.size())};
      args.rows = got.rows.data();
      args.scales = got.scales.data();
      encode(args, 0, args.num_rows);
      EP_CHECK_EQ(got.rows, want.rows);
      EP_CHECK_EQ(got.scales, want.scales);
    }
  });
}

EP_TEST(ChunksAreEncodedInAnyOrder) {
  std::mt19937_64 rng(2);
  for (const std::int64_t num_rows : {0, 1, 100}) {
    EncodeRowsArgs args = ArgsOf(num_rows, 7000, 128);
    Numbers x(args.dtype, num_rows * args.hidden);
    x.FillRandomly(rng);
    const EncodedRows want = ReferenceEncoding(x, args);
    EncodedRows got = {.rows = std::vector<std::uint8_t>(want.rows.size()),
                       .scales = std::vector<float>(want.scales.size())};
    args.x = x.at(0);
    args.rows = got.rows.data();
    args.scales = got.scales.data();
    const Work work = cpu::EncodeRowsWork(args);
    EP_CHECK(num_rows < 100 || work.num_chunks > 1);
    RunShuffled(work, rng);
    EP_CHECK_EQ(got.rows, want.rows);
    EP_CHECK_EQ(got.scales, want.scales);
  }
}

}  // namespace
}  // namespace jax_ep
