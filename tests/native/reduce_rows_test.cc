// The kernel for CPUs that sums rows, against sums taken one number at a time.
#include "cpu/reduce_rows.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "common/dropped.h"
#include "numbers.h"
#include "run_work.h"
#include "token_rows.h"

namespace jax_ep {
namespace {

// The kept rows of token t: ascending rank, within a rank ascending k.
std::vector<Summand> SummandsOf(const TokenRows& tokens, std::int64_t t,
                                const std::vector<float>& weights) {
  std::vector<Summand> summands;
  for (std::int64_t k = 0; k < tokens.geometry.num_topk; ++k) {
    const auto choice = static_cast<std::size_t>(t * tokens.geometry.num_topk + k);
    if (tokens.send_row[choice] == kDropped) continue;
    const std::size_t rank = tokens.RankOf(choice);
    summands.push_back({.rows = &tokens.rows[rank],
                        .start = tokens.RowStart(choice),
                        .weight = weights.empty() ? 1.0F : weights[choice],
                        .rank = static_cast<std::int32_t>(rank)});
  }
  std::ranges::stable_sort(summands, {}, &Summand::rank);
  return summands;
}

void CheckReduce(const TokenRows& tokens, DType dtype, bool weighted,
                 std::mt19937_64& rng) {
  std::vector<float> weights;
  for (std::size_t i = 0; weighted && i < tokens.send_row.size(); ++i) {
    weights.push_back(std::normal_distribution<float>(0, 1)(rng));
  }
  const std::int64_t num_tokens = tokens.geometry.num_tokens;
  Numbers out(dtype, num_tokens * tokens.hidden);
  out.Fill(7);
  const ReduceRowsArgs args = {.rows = PeerTable(tokens.table.data()),
                               .weights = weighted ? weights.data() : nullptr,
                               .send_rank = tokens.send_rank.data(),
                               .send_row = tokens.send_row.data(),
                               .out = out.at(0),
                               .num_ranks = tokens.geometry.num_ranks,
                               .num_tokens = num_tokens,
                               .num_topk = tokens.geometry.num_topk,
                               .capacity = tokens.geometry.capacity,
                               .hidden = tokens.hidden,
                               .dtype = dtype,
                               .ranks_per_node = tokens.geometry.ranks_per_node};
  const Work work = cpu::ReduceRowsWork(args);
  if (weighted) {
    RunShuffled(work, rng);
  } else {
    RunAtOnce(work);
  }
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    const std::vector<Summand> summands = SummandsOf(tokens, t, weights);
    for (std::int64_t h = 0; h < tokens.hidden; ++h) {
      const double want = ReferenceSum(dtype, summands, h, args.ranks_per_node);
      if (!EP_CHECK(SameNumber(out[t * tokens.hidden + h], want))) return;
    }
  }
}

void CheckAllRoutings(Geometry geometry, DType dtype, std::int64_t hidden,
                      std::mt19937_64& rng) {
  for (const Routing routing : kAllRoutings) {
    const Case which(std::string(Name(dtype)) + " H=" + Show(hidden) + " " +
                     geometry.Text());
    const TokenRows tokens(geometry, routing, dtype, hidden, rng);
    CheckReduce(tokens, dtype, false, rng);
    CheckReduce(tokens, dtype, true, rng);
  }
}

EP_TEST(ReduceSumsEachTokensRows) {
  std::mt19937_64 rng(1);
  for (const DType dtype : kAllDTypes) {
    for (const std::int64_t hidden : {0, 1, 37}) {
      CheckAllRoutings({.num_ranks = 4,
                        .num_local_experts = 3,
                        .num_tokens = 20,
                        .num_topk = 6,
                        .capacity = 130,
                        .alignment = 4},
                       dtype, hidden, rng);
    }
  }
}

EP_TEST(ReduceSumsByNode) {
  std::mt19937_64 rng(5);
  for (const DType dtype : kAllDTypes) {
    for (const std::int64_t ranks_per_node : {2, 3, 6}) {
      CheckAllRoutings({.num_ranks = 6,
                        .num_local_experts = 2,
                        .num_tokens = 20,
                        .num_topk = 7,
                        .capacity = 100,
                        .ranks_per_node = ranks_per_node},
                       dtype, 37, rng);
    }
  }
}

// Some choices have no row, and some tokens none at all.
EP_TEST(ReduceLeavesOutDroppedChoices) {
  std::mt19937_64 rng(2);
  for (const DType dtype : kAllDTypes) {
    CheckAllRoutings({.num_ranks = 3,
                      .num_local_experts = 2,
                      .num_tokens = 20,
                      .num_topk = 4,
                      .capacity = 9},
                     dtype, 17, rng);
  }
}

EP_TEST(ReduceRunsInManyChunks) {
  std::mt19937_64 rng(3);
  for (const std::int64_t hidden : {5000, 12000}) {
    CheckAllRoutings({.num_ranks = 2,
                      .num_local_experts = 2,
                      .num_tokens = hidden == 5000 ? 19 : 4,
                      .num_topk = 3,
                      .capacity = 40},
                     DType::kF32, hidden, rng);
  }
}

EP_TEST(ReduceWithoutTokensDoesNothing) {
  std::mt19937_64 rng(4);
  CheckAllRoutings({.num_ranks = 2, .num_tokens = 0, .num_topk = 2}, DType::kF32, 8,
                   rng);
}

}  // namespace
}  // namespace jax_ep
