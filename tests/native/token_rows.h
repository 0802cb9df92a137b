// The rows of tokens with what they hold and whose they are, for tests of kernels that
// pull them.

#ifndef JAX_EP_TESTS_NATIVE_TOKEN_ROWS_H_
#define JAX_EP_TESTS_NATIVE_TOKEN_ROWS_H_

#include <cstddef>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "common/dropped.h"
#include "numbers.h"
#include "plan_reference.h"

namespace jax_ep {

// What one rank's tokens need of all ranks' rows: random numbers in the rows that its
// choices name, NaN in all others.
struct TokenRows {
  TokenRows(const Geometry& g, Routing routing, DType dtype, std::int64_t size,
            std::mt19937_64& rng)
      : geometry(g), hidden(size) {
    const RankPlan plan =
        ReferencePlans(geometry, RandomChoices(geometry, routing, rng))[rank];
    send_rank = plan.send_rank;
    send_row = plan.send_row;
    const auto num_ranks = static_cast<std::size_t>(geometry.num_ranks);
    rows.assign(num_ranks, Numbers(dtype, geometry.capacity * hidden));
    for (Numbers& numbers : rows) {
      numbers.Fill(std::numeric_limits<double>::quiet_NaN());
      table.push_back(numbers.at(0));
    }
    Numbers row(dtype, hidden);
    for (std::size_t choice = 0; choice < send_row.size(); ++choice) {
      if (send_row[choice] == kDropped) continue;
      row.FillRandomly(rng);
      for (std::int64_t h = 0; h < hidden; ++h) {
        rows[RankOf(choice)].Set(RowStart(choice) + h, row[h]);
      }
    }
  }

  std::size_t RankOf(std::size_t choice) const {
    return static_cast<std::size_t>(send_rank[choice]);
  }
  std::int64_t RowStart(std::size_t choice) const { return send_row[choice] * hidden; }

  static constexpr std::int64_t rank = 1;  // NOLINT(readability-identifier-naming)
  Geometry geometry;
  std::int64_t hidden;
  std::vector<std::int32_t> send_rank;
  std::vector<std::int32_t> send_row;
  std::vector<Numbers> rows;
  std::vector<const void*> table;
};

}  // namespace jax_ep

#endif  // JAX_EP_TESTS_NATIVE_TOKEN_ROWS_H_
