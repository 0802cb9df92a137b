// The emulated kernels that add up rows before and after the wire, against the one that
// does both, bit for bit.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "common/dropped.h"
#include "cuda/partial_sums.h"
#include "cuda/reduce_rows.h"
#include "cuda_launches.h"
#include "numbers.h"
#include "plan_reference.h"
#include "stacked_ranks.h"

namespace jax_ep {
namespace {

// Choices of a token on one rank, in ascending k, by (token of all ranks, rank).
std::map<std::pair<std::size_t, std::int32_t>, std::vector<std::size_t>> ChoicesByRank(
    const StackedRanks& ranks) {
  std::map<std::pair<std::size_t, std::int32_t>, std::vector<std::size_t>> choices;
  for (std::size_t choice = 0; choice < ranks.send_row.size(); ++choice) {
    if (ranks.send_row[choice] == kDropped) continue;
    const std::size_t token =
        choice / static_cast<std::size_t>(ranks.geometry.num_topk);
    choices[{token, ranks.send_rank[choice]}].push_back(choice);
  }
  return choices;
}

// All operands and results of both kernels, of all ranks.
class Exchange {
 public:
  Exchange(const StackedRanks& ranks, DType dtype, std::int64_t hidden, bool weighted,
           bool all, std::mt19937_64& rng)
      : ranks_(ranks),
        hidden_(hidden),
        weighted_(weighted),
        all_(all),
        rows_(ranks.RowsOfChoices(dtype, hidden, rng)),
        weights_(DType::kF32, ranks.num_choices()),
        partials_(num_partials() * row_bytes(), rng),
        has_addresses_(rng() % 2 == 0) {
    weights_.FillRandomly(rng);
    if (rng() % 3 != 0) return;
    AddSpecials(rows_, rng);
    AddSpecials(weights_, rng);
  }

  DType dtype() const { return rows_.dtype(); }
  std::int64_t row_bytes() const { return hidden_ * ByteWidth(dtype()); }
  std::int64_t num_partials() const {
    return ranks_.geometry.num_ranks * NumPartials(ranks_.geometry);
  }

  bool SumPartials() {
    const Geometry& geometry = ranks_.geometry;
    const StackedPeers weights = Peers(weights_.at(0), geometry.choices_per_rank() * 4);
    return EP_CHECK_RAN(
        cuda::SumPartials({.rows = rows_.at(0),
                           .weights = weighted_ ? weights.table() : PeerTable(),
                           .recv_choice = ranks_.recv_choice.data(),
                           .recv_row = ranks_.recv_row.data(),
                           .recv_counts = ranks_.recv_counts.data(),
                           .partials = partials_.data(),
                           .num_ranks = geometry.num_ranks,
                           .num_tokens = geometry.num_tokens,
                           .num_topk = geometry.num_topk,
                           .capacity = geometry.capacity,
                           .hidden = hidden_,
                           .dtype = dtype(),
                           .weighted = weighted_,
                           .all = all_},
                          geometry.num_ranks, nullptr));
  }

  void ReduceRows(Pulled pulled, Output<char>& out) {
    const Geometry& geometry = ranks_.geometry;
    const StackedPeers rows = Peers(rows_.at(0), geometry.capacity * row_bytes());
    const StackedPeers partials =
        Peers(partials_.data(), NumPartials(geometry) * row_bytes());
    const auto* weights = static_cast<const float*>(weights_.at(0));
    EP_CHECK_RAN(cuda::ReduceRows({.rows = rows.table(),
                                   .weights = weighted_ ? weights : nullptr,
                                   .send_rank = ranks_.send_rank.data(),
                                   .send_row = ranks_.send_row.data(),
                                   .out = out.data(),
                                   .num_ranks = geometry.num_ranks,
                                   .num_tokens = geometry.num_tokens,
                                   .num_topk = geometry.num_topk,
                                   .capacity = geometry.capacity,
                                   .hidden = hidden_,
                                   .dtype = dtype(),
                                   .pulled = pulled,
                                   .partials = partials.table(),
                                   .ranks_per_node = geometry.ranks_per_node},
                                  geometry.num_ranks, nullptr));
  }

  // Checks where sums were written, and what: `before` held the partials before.
  void CheckPartials(const Output<char>& before) const {
    Output<char> wanted = before;
    for (const auto& [where, choices] : ChoicesByRank(ranks_)) {
      if (choices.size() < 2 && !all_) continue;
      const auto [token, rank] = where;
      const std::int64_t to = StandByToken(ranks_.geometry)
                                  ? (rank * NumPartials(ranks_.geometry) +
                                     static_cast<std::int64_t>(token)) *
                                        hidden_
                                  : StartOf(choices[0]);
      std::vector<Summand> summands;
      for (const std::size_t choice : choices) {
        const double weight =
            weighted_ ? weights_[static_cast<std::int64_t>(choice)] : 1;
        summands.push_back({.rows = &rows_,
                            .start = StartOf(choice),
                            .weight = static_cast<float>(weight),
                            .rank = rank});
      }
      for (std::int64_t h = 0; h < hidden_; ++h) {
        const double sum = ReferenceSum(dtype(), summands, h);
        // The reference has added it to a total, where a zero loses its sign.
        const double got = LoadNumber(dtype(), partials_.data(), to + h);
        StoreNumber(dtype(), wanted.data(), to + h,
                    sum == 0 ? std::copysign(sum, got) : sum);
      }
    }
    CheckSameNumbers(dtype(), partials_.data(), wanted.data(), num_partials() * hidden_,
                     hidden_);
    EP_CHECK(partials_.IsIntactBehind());
  }

  // What is added up already, nobody may pull once more.
  void SpoilSummedRows() {
    for (const auto& [where, choices] : ChoicesByRank(ranks_)) {
      if (choices.size() < 2 && !all_) continue;
      for (const std::size_t choice : choices) {
        for (std::int64_t h = 0; h < hidden_; ++h) {
          rows_.Set(StartOf(choice) + h, 1000 + static_cast<double>(h));
        }
      }
    }
  }

  const Output<char>& partials() const { return partials_; }

 private:
  StackedPeers Peers(const void* first, std::int64_t bytes_between) const {
    return {first, bytes_between, ranks_.geometry.num_ranks, has_addresses_};
  }

  // The first element of a choice's row, among those of all ranks' rows.
  std::int64_t StartOf(std::size_t choice) const {
    return (ranks_.send_rank[choice] * ranks_.geometry.capacity +
            ranks_.send_row[choice]) *
           hidden_;
  }

  const StackedRanks& ranks_;
  std::int64_t hidden_;
  bool weighted_;
  bool all_;
  Numbers rows_;
  Numbers weights_;
  Output<char> partials_;
  bool has_addresses_;
};

void CheckSums(const StackedRanks& ranks, DType dtype, std::int64_t hidden,
               bool weighted, bool all, std::mt19937_64& rng) {
  const std::uint64_t seed = rng();
  const Case which(std::string(Name(dtype)) + " H=" + Show(hidden) +
                   " weighted=" + Show(weighted) + " all=" + Show(all) + " " +
                   ranks.geometry.Text() + " seed=" + Show(seed));
  emulation::SetSeed(seed);
  Exchange exchange(ranks, dtype, hidden, weighted, all, rng);
  const Output<char> before = exchange.partials();
  Output<char> out(ranks.num_tokens() * exchange.row_bytes(), rng);
  Output<char> wanted = out;
  exchange.ReduceRows(Pulled::kRows, wanted);
  if (!exchange.SumPartials()) return;
  exchange.CheckPartials(before);
  exchange.SpoilSummedRows();
  exchange.ReduceRows(all ? Pulled::kSums : Pulled::kSumsOfSeveral, out);
  CheckSameNumbers(dtype, out.data(), wanted.data(), ranks.num_tokens() * hidden,
                   hidden);
  EP_CHECK(out.IsIntactBehind());
}

void CheckAllRoutings(const Geometry& geometry, DType dtype, std::int64_t hidden,
                      std::mt19937_64& rng) {
  for (const Routing routing : kAllRoutings) {
    const StackedRanks ranks(geometry, routing, rng);
    for (const bool all : {false, true}) {
      CheckSums(ranks, dtype, hidden, false, all, rng);
      CheckSums(ranks, dtype, hidden, true, all, rng);
    }
  }
}

// Rows of one element, of several, and of more than a block adds up at once; tokens
// that keep all choices, some, and none; one row, several, and all on one rank.
EP_TEST(AddsUpWhatOneRankHasOfAToken) {
  std::mt19937_64 rng(1);
  for (const DType dtype : kAllDTypes) {
    for (const std::int64_t hidden : {0, 1, 8, 37, 264}) {
      for (const std::int64_t capacity : {12, 100}) {
        CheckAllRoutings({.num_ranks = 3,
                          .num_local_experts = 2,
                          .num_tokens = 5,
                          .num_topk = 6,
                          .capacity = capacity,
                          .alignment = 4,
                          .ranks_per_node = capacity == 12 ? 1 : 3},
                         dtype, hidden, rng);
      }
    }
    for (const std::int64_t hidden : {301, 2200, 9000}) {
      CheckAllRoutings({.num_ranks = 2, .num_tokens = 2, .num_topk = 3, .capacity = 12},
                       dtype, hidden, rng);
    }
  }
}

// A block has one token after the other.
EP_TEST(AddsUpMoreTokensThanBlocks) {
  std::mt19937_64 rng(2);
  CheckAllRoutings({.num_ranks = 4,
                    .num_local_experts = 3,
                    .num_tokens = 30,
                    .num_topk = 4,
                    .capacity = 60,
                    .alignment = 2},
                   DType::kBF16, 40, rng);
}

EP_TEST(RefusesRowsOfTooManyBytes) {
  PartialSumsArgs args = {};
  args.hidden = std::int64_t{1} << 30;
  args.dtype = DType::kBF16;
  EP_CHECK_EQ(cuda::SumPartials(args, 1, nullptr), cudaErrorInvalidValue);
}

// More choices than a warp has lanes, so that a rank's may lie on both sides of its
// end.
EP_TEST(AddsUpManyChoices) {
  std::mt19937_64 rng(3);
  for (const std::int64_t num_ranks : {2, 9}) {
    for (const std::int64_t topk : {32, 33, 64}) {
      CheckAllRoutings({.num_ranks = num_ranks,
                        .num_local_experts = 2,
                        .num_tokens = 3,
                        .num_topk = topk,
                        .capacity = 150},
                       DType::kF16, 16, rng);
    }
  }
}

}  // namespace
}  // namespace jax_ep
