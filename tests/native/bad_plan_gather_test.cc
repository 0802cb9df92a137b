// What gathering on CPUs makes of plans that hold anything.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "bad_plan.h"
#include "check.h"
#include "cpu/gather_rows.h"
#include "cpu/plan_fault.h"
#include "gathering.h"
#include "plan_reference.h"
#include "run_work.h"

namespace jax_ep {
namespace {

using Numbers32 = std::vector<std::int32_t>;

// Tokens that want several experts of one rank, so that the receive list is full of
// runs of one token; chunks of `rows_per_chunk` entries cut them anywhere.
Gathering Several(std::int64_t rows_per_chunk, std::mt19937_64& rng) {
  const Geometry geometry = {.num_ranks = 3,
                             .num_local_experts = 4,
                             .num_tokens = 4,
                             .num_topk = 7,
                             .capacity = 48,
                             .alignment = 2};
  const auto choices = RandomChoices(geometry, Routing::kDistinct, rng);
  return {geometry, choices, 1, rows_per_chunk == 3 ? 100000 : 24, rng};
}

// Runs the gathering with one of its numbers replaced. `wanted` is what comes out.
void CheckSpoilt(Gathering& gathering, Numbers32& field, const char* name,
                 std::size_t i, std::int32_t value, bool scaled,
                 const std::vector<char>& wanted, std::mt19937_64& rng) {
  const Case which(std::string(name) + "[" + Show(i) + "] = " + Show(value) +
                   (scaled ? ", scaled" : ""));
  const std::int32_t good = std::exchange(field[i], value);
  cpu::PlanFault fault;
  EP_CHECK(gathering.Run(scaled, &fault, rng) == wanted);
  CheckFault(fault, name);
  gathering.Run(scaled, nullptr, rng);  // who does not ask need not be told
  field[i] = good;
}

// An entry of the receive list that is none leaves its row alone, and no other.
EP_TEST(EntriesOutOfRangeAreLeftOut) {
  std::mt19937_64 rng(1);
  for (const std::int64_t rows_per_chunk : {3, 64}) {
    Gathering gathering = Several(rows_per_chunk, rng);
    const Geometry& geometry = gathering.geometry;
    RankPlan& plan = gathering.plan;
    const auto received = static_cast<std::size_t>(
        std::accumulate(plan.recv_counts.begin(), plan.recv_counts.end(), 0));
    const std::int64_t num_choices = geometry.num_ranks * geometry.choices_per_rank();
    const std::size_t step = (rows_per_chunk == 3 ? 5 : 1) * kOneIn;
    for (const bool scaled : {false, true}) {
      cpu::PlanFault fault;
      const std::vector<char> good = gathering.Run(scaled, &fault, rng);
      CheckFault(fault, "");
      for (std::size_t i = 0; i < received; i += step) {
        std::vector<char> wanted = good;
        std::fill_n(wanted.begin() + plan.recv_row[i] * gathering.row_bytes,
                    gathering.row_bytes, Gathering::kUntouched);
        for (const std::int32_t value : NumbersOutside(num_choices)) {
          CheckSpoilt(gathering, plan.recv_choice, "recv_choice", i, value, scaled,
                      wanted, rng);
        }
        for (const std::int32_t value : NumbersOutside(geometry.capacity)) {
          CheckSpoilt(gathering, plan.recv_row, "recv_row", i, value, scaled, wanted,
                      rng);
        }
      }
    }
  }
}

// Where the cut into chunks has nothing to rest on, there is no work.
EP_TEST(CountsThatCannotBeAreRefused) {
  std::mt19937_64 rng(2);
  Gathering gathering = Several(64, rng);
  RankPlan& plan = gathering.plan;
  const std::vector<char> untouched(gathering.rows.size(), Gathering::kUntouched);
  const auto capacity = static_cast<std::int32_t>(gathering.geometry.capacity);
  for (const bool scaled : {false, true}) {
    const auto check = [&](Numbers32& field, const char* name, std::size_t i,
                           std::int32_t value) {
      CheckSpoilt(gathering, field, name, i, value, scaled, untouched, rng);
    };
    for (const std::int32_t value : {kLowest, -1, capacity + 1, kHighest}) {
      for (std::size_t i = 0; i < plan.recv_counts.size(); ++i) {
        check(plan.recv_counts, "recv_counts", i, value);
      }
      for (std::size_t i = 0; i < plan.group_sizes.size(); ++i) {
        check(plan.group_sizes, "group_sizes", i, value);
      }
    }
    for (std::size_t i = 0; i < plan.group_rows.size(); ++i) {
      for (const std::int32_t value :
           {kLowest, -1, plan.group_sizes[i] + 1, kHighest}) {
        check(plan.group_rows, "group_rows", i, value);
      }
    }
  }
}

// One row more than there is, of numbers that are all fine; and sums that are fine, of
// numbers that are not, or that would be in 32 bits.
EP_TEST(SumsThatCannotBeAreRefused) {
  std::mt19937_64 rng(3);
  for (const bool counts : {true, false}) {
    const char* name = counts ? "recv_counts" : "group_sizes";
    for (const int way : {0, 1, 2}) {
      Gathering gathering = Several(64, rng);
      Numbers32& field =
          counts ? gathering.plan.recv_counts : gathering.plan.group_sizes;
      if (way == 0) {
        const auto sum = std::accumulate(field.begin(), field.end(), 0);
        field[0] += static_cast<std::int32_t>(gathering.geometry.capacity) + 1 - sum;
      } else if (way == 1) {
        field[0] += 1000;
        field[1] -= 1000;
      } else {
        std::ranges::fill(field, kHighest);
        field[0] = 4;
      }
      CheckSpoilt(gathering, field, name, 2, field[2], way == 2,
                  std::vector<char>(gathering.rows.size(), Gathering::kUntouched), rng);
    }
  }
}

// Entries where there are no choices, be it for want of tokens or of choices of each.
EP_TEST(EntriesWithoutChoicesAreLeftOut) {
  std::mt19937_64 rng(4);
  for (const bool has_tokens : {false, true}) {
    const Geometry geometry = {.num_ranks = 2,
                               .num_local_experts = 2,
                               .num_tokens = has_tokens ? 3 : 0,
                               .num_topk = has_tokens ? 0 : 3,
                               .capacity = 5};
    Gathering gathering(geometry, {}, 0, 8, rng);
    gathering.plan.recv_counts = {2, 3};
    gathering.plan.recv_choice = {0, 1, -1, 5, 0};
    gathering.plan.recv_row = {0, 1, 2, 3, 4};
    for (const bool scaled : {false, true}) {
      cpu::PlanFault fault;
      const std::vector<char> rows = gathering.Run(scaled, &fault, rng);
      EP_CHECK(rows == std::vector<char>(rows.size(), '\0'));
      CheckFault(fault, "recv_choice");
    }
  }
}

// Whatever a plan holds.
EP_TEST(AnyNumbersAnywhere) {
  std::mt19937_64 rng(5);
  for (std::size_t turn = 0; turn < 3000 / kOneIn; ++turn) {
    Gathering gathering = Several(turn % 100 == 0 ? 3 : 64, rng);
    RankPlan& plan = gathering.plan;
    const auto spoil = [&](Numbers32& field, std::int64_t size) {
      for (std::int32_t& number : field) {
        if (rng() % 8 != 0) continue;
        const Numbers32 outside = NumbersOutside(size);
        const auto any = static_cast<std::int32_t>(rng());
        number = rng() % 4 == 0 ? any : outside[rng() % outside.size()];
      }
    };
    const auto bits = rng();
    if ((bits & 1) != 0) spoil(plan.recv_choice, 84);
    if ((bits & 2) != 0) spoil(plan.recv_row, 48);
    if ((bits & 12) == 0) spoil(plan.recv_counts, 3);
    if ((bits & 48) == 0) spoil(plan.group_sizes, 3);
    if ((bits & 192) == 0) spoil(plan.group_rows, 1);
    cpu::PlanFault fault;
    gathering.Run(turn % 2 == 0, &fault, rng);
  }
}

}  // namespace
}  // namespace jax_ep
