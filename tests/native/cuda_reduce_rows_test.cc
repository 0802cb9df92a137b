// The emulated kernel that sums rows, against that for CPUs, bit for bit.
#include <cstdint>
#include <random>
#include <string>

#include "check.h"
#include "cpu/reduce_rows.h"
#include "cuda/reduce_rows.h"
#include "cuda_launches.h"
#include "numbers.h"
#include "plan_reference.h"
#include "run_work.h"
#include "stacked_ranks.h"

namespace jax_ep {
namespace {

ReduceRowsArgs Arguments(const StackedRanks& ranks, DType dtype, std::int64_t hidden) {
  return {.rows = PeerTable(),
          .weights = nullptr,
          .send_rank = ranks.send_rank.data(),
          .send_row = ranks.send_row.data(),
          .out = nullptr,
          .num_ranks = ranks.geometry.num_ranks,
          .num_tokens = ranks.geometry.num_tokens,
          .num_topk = ranks.geometry.num_topk,
          .capacity = ranks.geometry.capacity,
          .hidden = hidden,
          .dtype = dtype,
          .ranks_per_node = ranks.geometry.ranks_per_node};
}

void CheckSums(const StackedRanks& ranks, DType dtype, std::int64_t hidden,
               bool weighted, std::mt19937_64& rng) {
  const std::uint64_t seed = rng();
  const Case which(std::string(Name(dtype)) + " H=" + Show(hidden) +
                   " weighted=" + Show(weighted) + " " + ranks.geometry.Text() +
                   " seed=" + Show(seed));
  emulation::SetSeed(seed);
  Numbers rows = ranks.RowsOfChoices(dtype, hidden, rng);
  Numbers weights(DType::kF32, ranks.num_choices());
  weights.FillRandomly(rng);
  if (seed % 3 == 0) {
    AddSpecials(rows, rng);
    AddSpecials(weights, rng);
  }
  const std::int64_t num_ranks = ranks.geometry.num_ranks;
  const StackedPeers peers(rows.at(0),
                           ranks.geometry.capacity * hidden * ByteWidth(dtype),
                           num_ranks, seed % 2 == 0);
  Output<char> out(ranks.num_tokens() * hidden * ByteWidth(dtype), rng);
  Output<char> wanted = out;
  ReduceRowsArgs args = Arguments(ranks, dtype, hidden);
  args.rows = peers.table();
  if (weighted) args.weights = static_cast<const float*>(weights.at(0));
  args.out = out.data();
  if (!EP_CHECK_RAN(cuda::ReduceRows(args, num_ranks, nullptr))) return;
  args.out = wanted.data();
  for (std::int64_t rank = 0; rank < num_ranks; ++rank) {
    const ReduceRowsArgs own = args.OfStacked(rank);
    RunShuffled(cpu::ReduceRowsWork(own), rng);
  }
  CheckSameNumbers(dtype, out.data(), wanted.data(), ranks.num_tokens() * hidden,
                   hidden);
  EP_CHECK(out.IsIntactBehind());
}

void CheckAllRoutings(const Geometry& geometry, DType dtype, std::int64_t hidden,
                      std::mt19937_64& rng) {
  for (const Routing routing : kAllRoutings) {
    const StackedRanks ranks(geometry, routing, rng);
    CheckSums(ranks, dtype, hidden, false, rng);
    CheckSums(ranks, dtype, hidden, true, rng);
  }
}

// Rows of one element, of several, and of more than a block adds up at once; tokens
// that keep all choices, some, and none.
EP_TEST(SumsEachTokensRows) {
  std::mt19937_64 rng(1);
  for (const DType dtype : kAllDTypes) {
    for (const std::int64_t hidden : {0, 1, 8, 37, 38, 264}) {
      for (const std::int64_t capacity : {12, 100}) {
        CheckAllRoutings({.num_ranks = 3,
                          .num_local_experts = 2,
                          .num_tokens = 5,
                          .num_topk = 6,
                          .capacity = capacity,
                          .alignment = 4},
                         dtype, hidden, rng);
      }
    }
    CheckAllRoutings({.num_ranks = 2, .num_tokens = 2, .num_topk = 3, .capacity = 12},
                     dtype, 2200, rng);
    CheckAllRoutings({.num_ranks = 2, .num_tokens = 2, .num_topk = 3, .capacity = 12},
                     dtype, 301, rng);
  }
}

EP_TEST(SumsByNode) {
  std::mt19937_64 rng(6);
  for (const DType dtype : kAllDTypes) {
    for (const std::int64_t ranks_per_node : {2, 3, 6}) {
      CheckAllRoutings({.num_ranks = 6,
                        .num_local_experts = 2,
                        .num_tokens = 5,
                        .num_topk = 9,
                        .capacity = 60,
                        .ranks_per_node = ranks_per_node},
                       dtype, 38, rng);
    }
  }
}

// A block has one token after the other, and ranks of their own.
EP_TEST(SumsMoreTokensThanBlocks) {
  std::mt19937_64 rng(2);
  CheckAllRoutings({.num_ranks = 4,
                    .num_local_experts = 3,
                    .num_tokens = 30,
                    .num_topk = 4,
                    .capacity = 60,
                    .alignment = 2},
                   DType::kBF16, 40, rng);
}

// More choices than a warp has lanes, up to as many as there is room for.
EP_TEST(SumsManyChoices) {
  std::mt19937_64 rng(3);
  for (const std::int64_t topk : {32, 33, 64}) {
    CheckAllRoutings({.num_ranks = 4,
                      .num_local_experts = 2,
                      .num_tokens = 3,
                      .num_topk = topk,
                      .capacity = 150},
                     DType::kF16, 16, rng);
  }
}

EP_TEST(RefusesMoreChoicesThanItHasRoomFor) {
  std::mt19937_64 rng(4);
  const StackedRanks ranks({.num_topk = 65, .capacity = 65}, Routing::kUniform, rng);
  EP_CHECK_EQ(cuda::ReduceRows(Arguments(ranks, DType::kF32, 4), 1, nullptr),
              cudaErrorInvalidValue);
}

EP_TEST(RefusesRowsOfTooManyBytes) {
  ReduceRowsArgs args = {};
  args.hidden = std::int64_t{1} << 30;
  args.dtype = DType::kBF16;
  EP_CHECK_EQ(cuda::ReduceRows(args, 1, nullptr), cudaErrorInvalidValue);
}

EP_TEST(SumsOfNoTokens) {
  std::mt19937_64 rng(5);
  CheckAllRoutings({.num_ranks = 2, .num_tokens = 0, .num_topk = 2}, DType::kF32, 8,
                   rng);
}

}  // namespace
}  // namespace jax_ep
