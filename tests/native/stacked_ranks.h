// The plans of stacked ranks, for the tests of kernels that gather their rows.

#ifndef JAX_EP_TESTS_NATIVE_STACKED_RANKS_H_
#define JAX_EP_TESTS_NATIVE_STACKED_RANKS_H_

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "common/dropped.h"
#include "common/peer_table.h"
#include "numbers.h"
#include "plan_reference.h"

namespace jax_ep {

// The plans of all ranks, one behind the other. What no plan fills in is
// far out of bounds.
struct StackedRanks {
  StackedRanks(const Geometry& g, Routing routing, std::mt19937_64& rng) : geometry(g) {
    const auto append = [](std::vector<std::int32_t>& all, const auto& own) {
      all.insert(all.end(), own.begin(), own.end());
    };
    for (const RankPlan& plan : ReferencePlans(g, RandomChoices(g, routing, rng))) {
      append(send_rank, plan.send_rank);
      append(send_row, plan.send_row);
      append(recv_counts, plan.recv_counts);
      append(group_sizes, plan.group_sizes);
      append(group_rows, plan.group_rows);
      append(recv_choice, plan.recv_choice);
      append(recv_row, plan.recv_row);
      const std::size_t all_rows = group_sizes.size() / plan.group_sizes.size() *
                                   static_cast<std::size_t>(g.capacity);
      recv_choice.resize(all_rows, kOutOfBounds);
      recv_row.resize(all_rows, kOutOfBounds);
    }
  }

  std::int64_t num_rows() const { return geometry.num_ranks * geometry.capacity; }
  std::int64_t num_tokens() const { return geometry.num_ranks * geometry.num_tokens; }
  std::int64_t num_choices() const { return num_tokens() * geometry.num_topk; }

  // Rows of all ranks: random where a choice names them, NaN elsewhere.
  Numbers RowsOfChoices(DType dtype, std::int64_t hidden, std::mt19937_64& rng) const {
    Numbers rows(dtype, num_rows() * hidden);
    rows.Fill(std::numeric_limits<double>::quiet_NaN());
    Numbers row(dtype, hidden);
    for (std::size_t choice = 0; choice < send_row.size(); ++choice) {
      if (send_row[choice] == kDropped) continue;
      row.FillRandomly(rng);
      const std::int64_t rank = send_rank[choice];
      const std::int64_t start = (rank * geometry.capacity + send_row[choice]) * hidden;
      for (std::int64_t h = 0; h < hidden; ++h) rows.Set(start + h, row[h]);
    }
    return rows;
  }

  static constexpr std::int32_t kOutOfBounds = 1 << 30;

  Geometry geometry;
  std::vector<std::int32_t> send_rank;
  std::vector<std::int32_t> send_row;
  std::vector<std::int32_t> recv_choice;
  std::vector<std::int32_t> recv_row;
  std::vector<std::int32_t> recv_counts;
  std::vector<std::int32_t> group_sizes;
  std::vector<std::int32_t> group_rows;
};

// A table of the ranks' shares of one buffer: of their addresses, or of the first
// one's.
class StackedPeers {
 public:
  StackedPeers(const void* first, std::int64_t bytes_between, std::int64_t num_ranks,
               bool has_addresses)
      : strided_(first, bytes_between), has_addresses_(has_addresses) {
    for (std::int64_t rank = 0; rank < num_ranks; ++rank) {
      addresses_.push_back(strided_[rank]);
    }
  }
  PeerTable table() const {
    return has_addresses_ ? PeerTable(addresses_.data()) : strided_;
  }

 private:
  PeerTable strided_;
  bool has_addresses_;
  std::vector<const void*> addresses_;
};

// Puts numbers in some places with which arithmetic ends.
inline void AddSpecials(Numbers& numbers, std::mt19937_64& rng) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const double specials[] = {kInfinity, -kInfinity, std::nan(""), std::ldexp(1.0, 127),
                             std::ldexp(1.0, -1060)};
  for (std::int64_t i = 0; i < numbers.size(); ++i) {
    if (rng() % 16 == 0) numbers.Set(i, specials[rng() % std::size(specials)]);
  }
}

// Both are equal to the last bit; only NaNs may be any. `row` numbers are one line of
// the message.
inline void CheckSameNumbers(DType dtype, const void* got, const void* want,
                             std::int64_t size, std::int64_t row) {
  const std::int64_t width = ByteWidth(dtype);
  for (std::int64_t i = 0; i < size; ++i) {
    if (std::memcmp(static_cast<const char*>(got) + i * width,
                    static_cast<const char*>(want) + i * width,
                    static_cast<std::size_t>(width)) == 0) {
      continue;
    }
    const double got_number = LoadNumber(dtype, got, i);
    const double want_number = LoadNumber(dtype, want, i);
    if (std::isnan(got_number) && std::isnan(want_number)) continue;
    NoteFailure(__FILE__, __LINE__,
                "row " + Show(i / row) + " has " + Show(got_number) + " at " +
                    Show(i % row) + ", not " + Show(want_number));
  }
}

}  // namespace jax_ep

#endif  // JAX_EP_TESTS_NATIVE_STACKED_RANKS_H_
