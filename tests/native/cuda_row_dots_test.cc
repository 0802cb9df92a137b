// The emulated kernel of rows' products, against that for CPUs, bit for bit.
#include <cstdint>
#include <random>
#include <string>

#include "check.h"
#include "cpu/row_dots.h"
#include "cuda/row_dots.h"
#include "cuda_launches.h"
#include "numbers.h"
#include "plan_reference.h"
#include "run_work.h"
#include "stacked_ranks.h"

namespace jax_ep {
namespace {

void CheckDots(const StackedRanks& ranks, DType dtype, std::int64_t hidden,
               std::mt19937_64& rng) {
  const std::uint64_t seed = rng();
  const Case which(std::string(Name(dtype)) + " H=" + Show(hidden) + " " +
                   ranks.geometry.Text() + " seed=" + Show(seed));
  emulation::SetSeed(seed);
  Numbers rows = ranks.RowsOfChoices(dtype, hidden, rng);
  Numbers dout(dtype, ranks.num_tokens() * hidden);
  dout.FillRandomly(rng);
  if (seed % 3 == 0) {
    AddSpecials(rows, rng);
    AddSpecials(dout, rng);
  }
  const std::int64_t num_ranks = ranks.geometry.num_ranks;
  const StackedPeers peers(rows.at(0),
                           ranks.geometry.capacity * hidden * ByteWidth(dtype),
                           num_ranks, seed % 2 == 0);
  Output<float> dots(ranks.num_choices(), rng);
  Output<float> wanted = dots;
  RowDotsArgs args = {.rows = peers.table(),
                      .dout = dout.at(0),
                      .send_rank = ranks.send_rank.data(),
                      .send_row = ranks.send_row.data(),
                      .dots = dots.data(),
                      .num_ranks = ranks.geometry.num_ranks,
                      .num_tokens = ranks.geometry.num_tokens,
                      .num_topk = ranks.geometry.num_topk,
                      .capacity = ranks.geometry.capacity,
                      .hidden = hidden,
                      .dtype = dtype};
  if (!EP_CHECK_RAN(cuda::RowDots(args, num_ranks, nullptr))) return;
  args.dots = wanted.data();
  for (std::int64_t rank = 0; rank < num_ranks; ++rank) {
    const RowDotsArgs own = args.OfStacked(rank);
    RunShuffled(cpu::RowDotsWork(own), rng);
  }
  CheckSameNumbers(DType::kF32, dots.data(), wanted.data(), ranks.num_choices(),
                   ranks.geometry.num_topk);
  EP_CHECK(dots.IsIntactBehind());
}

EP_TEST(DotsOfKeptChoicesAndZerosOfDropped) {
  std::mt19937_64 rng(1);
  for (const DType dtype : kAllDTypes) {
    for (const std::int64_t hidden : {0, 1, 63, 65, 200}) {
      for (const Routing routing : kAllRoutings) {
        for (const std::int64_t capacity : {8, 100}) {
          const StackedRanks ranks({.num_ranks = 3,
                                    .num_local_experts = 2,
                                    .num_tokens = 10,
                                    .num_topk = 4,
                                    .capacity = capacity,
                                    .alignment = 4},
                                   routing, rng);
          CheckDots(ranks, dtype, hidden, rng);
        }
      }
    }
  }
}

// As many choices as a warp multiplies together, fewer, and more; rows of several
// steps.
EP_TEST(DotsOfAnyNumberOfChoices) {
  std::mt19937_64 rng(3);
  for (const DType dtype : kAllDTypes) {
    for (const std::int64_t topk : {1, 3, 5, 8, 70}) {
      const StackedRanks ranks({.num_ranks = 2,
                                .num_local_experts = 2,
                                .num_tokens = 7,
                                .num_topk = topk,
                                .capacity = 6 * topk},
                               Routing::kHoles, rng);
      CheckDots(ranks, dtype, 258, rng);
      CheckDots(ranks, dtype, 771, rng);
    }
  }
}

EP_TEST(RefusesRowsOfTooManyBytes) {
  RowDotsArgs args = {};
  args.hidden = std::int64_t{1} << 30;
  args.dtype = DType::kBF16;
  EP_CHECK_EQ(cuda::RowDots(args, 1, nullptr), cudaErrorInvalidValue);
}

EP_TEST(DotsOfNoTokens) {
  std::mt19937_64 rng(2);
  const StackedRanks ranks({.num_ranks = 2, .num_tokens = 0, .num_topk = 2},
                           Routing::kUniform, rng);
  CheckDots(ranks, DType::kF16, 8, rng);
}

}  // namespace
}  // namespace jax_ep
