// What the GPU's partial sums are of plans that hold anything.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "bad_plan.h"
#include "check.h"
#include "common/partial_sums.h"
#include "common/plan_bounds.h"
#include "cuda_bad_plan.h"
#include "cuda_launches.h"
#include "numbers.h"
#include "plan_reference.h"
#include "stacked_ranks.h"

namespace jax_ep {
namespace {

// The reference has added sums to a total, where a zero loses its sign.
std::vector<char> WithoutSignedZeros(std::vector<char> result) {
  for (std::size_t i = 0; i < result.size(); i += sizeof(float)) {
    float number = 0;
    std::memcpy(&number, &result[i], sizeof(float));
    if (number == 0) std::fill_n(result.begin() + static_cast<std::ptrdiff_t>(i), 4, 0);
  }
  return result;
}

// What a rank's partial sums are by what its entries say: those that follow each other
// and are of one token are added up, at the row of the first that has one.
void AddPartials(const Exchange& exchange, std::size_t rank, bool all,
                 std::vector<char>& sums) {
  const StackedRanks& ranks = exchange.ranks;
  const Geometry& geometry = ranks.geometry;
  const auto num_ranks = static_cast<std::size_t>(geometry.num_ranks);
  std::int64_t entries = 0;
  for (std::size_t source = 0; source < num_ranks; ++source) {
    entries += ranks.recv_counts[rank * num_ranks + source];
  }
  entries = std::clamp<std::int64_t>(entries, 0, geometry.capacity);
  const auto own = static_cast<std::int64_t>(rank) * geometry.capacity;
  const auto choice_of = [&](std::int64_t entry) {
    return ranks.recv_choice[static_cast<std::size_t>(own + entry)];
  };
  for (std::int64_t end = 0, first = 0; first < entries; first = end) {
    const auto token = [&](std::int64_t entry) {
      const bool is_choice = IsIndex(choice_of(entry), ranks.num_choices());
      return is_choice ? choice_of(entry) / geometry.num_topk : kNoToken;
    };
    for (end = first + 1; end < entries && token(end) == token(first);) ++end;
    if (token(first) == kNoToken || (end == first + 1 && !all)) continue;
    std::vector<Summand> summands;
    for (std::int64_t entry = first; entry < end; ++entry) {
      const auto row = ranks.recv_row[static_cast<std::size_t>(own + entry)];
      if (!IsIndex(row, geometry.capacity)) continue;
      const double weight = exchange.weights[choice_of(entry)];
      summands.push_back({.rows = &exchange.rows[rank],
                          .start = row * kHidden,
                          .weight = static_cast<float>(weight),
                          .rank = 0});
    }
    for (std::int64_t h = 0; h < kHidden && !summands.empty(); ++h) {
      StoreNumber(DType::kF32, sums.data() + Exchange::kGuard,
                  own * kHidden + summands[0].start + h,
                  ReferenceSum(DType::kF32, summands, h));
    }
  }
}

EP_TEST(PartialSumsAreOfWhatIsThere) {
  std::mt19937_64 rng(5);
  Exchange exchange(rng);
  StackedRanks& ranks = exchange.ranks;
  const Geometry& geometry = ranks.geometry;
  // Two numbers at once, too: equal neighbours are one token's, if they are choices.
  const auto check = [&](Numbers32& field, const char* name, std::int64_t size,
                         const Numbers32& values) {
    for (std::int64_t i = size; i < 2 * size; ++i) {
      for (const auto value : values) {
        for (const std::int64_t count : {1, 2}) {
          const Case which(std::string(name) + "[" + Show(i) + "] = " + Show(value) +
                           ", " + Show(count) + " times");
          const Numbers32 kept = field;
          std::fill_n(field.begin() + i, count, value);
          for (const bool all : {false, true}) {
            const std::vector<char> got = WithoutSignedZeros(exchange.SumPartials(all));
            std::vector<char> wanted(got.size(), kUntouched);
            for (std::size_t rank = 0; rank < exchange.rows.size(); ++rank) {
              AddPartials(exchange, rank, all, wanted);
            }
            EP_CHECK(got == wanted);
          }
          field = kept;
        }
      }
    }
  };
  Numbers32 choices = NumbersOutside(ranks.num_choices());
  for (std::int32_t i = 0; i < ranks.num_choices(); ++i) choices.push_back(i);
  check(ranks.recv_choice, "recv_choice", geometry.capacity, choices);
  check(ranks.recv_row, "recv_row", geometry.capacity,
        NumbersOutside(geometry.capacity));
  check(ranks.recv_counts, "recv_counts", geometry.num_ranks,
        NumbersOutside(geometry.capacity));
}

// Sums that stand by token, whatever the token: what they are is of no interest.
EP_TEST(PartialSumsByTokenAreKeptInBounds) {
  std::mt19937_64 rng(6);
  Exchange exchange(rng, 40);
  StackedRanks& ranks = exchange.ranks;
  EP_CHECK(StandByToken(ranks.geometry));
  const std::size_t first = Exchange::Middle(ranks.geometry.capacity);
  const auto is_untouched = [](char c) { return c == kUntouched; };
  Numbers32 choices = NumbersOutside(ranks.num_choices());
  for (std::int32_t i = 0; i < ranks.num_choices(); ++i) choices.push_back(i);
  for (std::size_t i = first; i < first + 5; ++i) {
    for (const std::int32_t choice : choices) {
      const Case which("recv_choice[" + Show(i) + "] = " + Show(choice));
      const std::int32_t kept = std::exchange(ranks.recv_choice[i], choice);
      const std::vector<char> got = exchange.SumPartials(true);
      const auto end = got.end() - Exchange::kGuard;
      EP_CHECK(std::all_of(got.begin(), got.begin() + Exchange::kGuard, is_untouched));
      EP_CHECK(std::all_of(end, got.end(), is_untouched));
      ranks.recv_choice[i] = kept;
    }
  }
}

}  // namespace
}  // namespace jax_ep
