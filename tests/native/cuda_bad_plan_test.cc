// What the kernels for GPUs make of plans that hold anything.
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
#include "common/dropped.h"
#include "common/plan_bounds.h"
#include "cuda/gather_rows.h"
#include "cuda/gather_scaled.h"
#include "cuda/partial_sums.h"
#include "cuda/reduce_rows.h"
#include "cuda/row_dots.h"
#include "cuda_launches.h"
#include "numbers.h"
#include "plan_reference.h"
#include "stacked_ranks.h"

namespace jax_ep {
namespace {

using Numbers32 = std::vector<std::int32_t>;

constexpr std::int64_t kHidden = 4;
constexpr std::int64_t kRowBytes = kHidden * 4;
constexpr char kUntouched = 'U';

// The operands and results of all kernels, and the plans of stacked ranks, of which a
// test spoils those of the middle one. Peers' buffers are of exact size and lie apart,
// the results have a guard on both sides, so that what is beside them is seen even
// without a sanitizer.
struct Exchange {
  explicit Exchange(std::mt19937_64& rng)
      : ranks({.num_ranks = 3,
               .num_local_experts = 2,
               .num_tokens = 3,
               .num_topk = 3,
               .capacity = 14,
               .alignment = 2},
              Routing::kUniform, rng),
        stacked_x(DType::kF32, ranks.num_tokens() * kHidden),
        weights(DType::kF32, ranks.num_choices()),
        dout(DType::kF32, ranks.num_tokens() * kHidden) {
    weights.FillRandomly(rng);
    dout.FillRandomly(rng);
    const Geometry& geometry = ranks.geometry;
    for (std::int64_t rank = 0; rank < geometry.num_ranks; ++rank) {
      x.emplace_back(DType::kF32, geometry.num_tokens * kHidden);
      rows.emplace_back(DType::kF32, geometry.capacity * kHidden);
      x.back().FillRandomly(rng);
      rows.back().FillRandomly(rng);
    }
    for (std::size_t i = 0; i < x.size(); ++i) {
      for (std::int64_t j = 0; j < x[i].size(); ++j) {
        stacked_x.Set(static_cast<std::int64_t>(i) * x[i].size() + j, x[i][j]);
      }
      x_table.push_back(x[i].at(0));
      rows_table.push_back(rows[i].at(0));
      weights_table.push_back(
          weights.at(static_cast<std::int64_t>(i) * geometry.choices_per_rank()));
    }
  }

  // Where the middle rank's numbers begin in a field that has so many of each.
  static std::size_t Middle(std::int64_t size) {
    return static_cast<std::size_t>(size);
  }

  // The rows of all ranks, by the lists of those that receive or of those that send.
  std::vector<char> Gather(bool scaled, bool by_source = false) const {
    const Geometry& geometry = ranks.geometry;
    const auto size = static_cast<std::size_t>(ranks.num_rows() * kRowBytes);
    std::vector<char> result(size + 2 * kGuard, kUntouched);
    const PeerTable stacked(stacked_x.at(0), geometry.num_tokens * kRowBytes);
    const GatherRowsArgs args = {.x = by_source ? stacked : PeerTable(x_table.data()),
                                 .weights = PeerTable(weights_table.data()),
                                 .recv_choice = ranks.recv_choice.data(),
                                 .recv_row = ranks.recv_row.data(),
                                 .recv_counts = ranks.recv_counts.data(),
                                 .group_sizes = ranks.group_sizes.data(),
                                 .group_rows = ranks.group_rows.data(),
                                 .rows = result.data() + kGuard,
                                 .num_ranks = geometry.num_ranks,
                                 .num_tokens = geometry.num_tokens,
                                 .num_topk = geometry.num_topk,
                                 .num_local_experts = geometry.num_local_experts,
                                 .capacity = geometry.capacity,
                                 .hidden = kHidden,
                                 .row_bytes = kRowBytes,
                                 .dtype = DType::kF32,
                                 .scaled = scaled,
                                 .zero_tail = true,
                                 .send_rank = ranks.send_rank.data(),
                                 .send_row = ranks.send_row.data()};
    EP_CHECK_RAN((scaled ? cuda::GatherScaled : cuda::GatherRows)(
        args, geometry.num_ranks, nullptr));
    return result;
  }

  // The partial sums of all ranks' rows.
  std::vector<char> SumPartials() const {
    const Geometry& geometry = ranks.geometry;
    const auto size = static_cast<std::size_t>(ranks.num_rows() * kRowBytes);
    // One behind the other, as the kernel knows only its own rank's.
    std::vector<char> own(size);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      std::memcpy(own.data() + i * size / rows.size(), rows[i].at(0),
                  size / rows.size());
    }
    std::vector<char> result(size + 2 * kGuard, kUntouched);
    EP_CHECK_RAN(cuda::SumPartials({.rows = own.data(),
                                    .weights = PeerTable(weights_table.data()),
                                    .recv_choice = ranks.recv_choice.data(),
                                    .recv_row = ranks.recv_row.data(),
                                    .recv_counts = ranks.recv_counts.data(),
                                    .partials = result.data() + kGuard,
                                    .num_ranks = geometry.num_ranks,
                                    .num_tokens = geometry.num_tokens,
                                    .num_topk = geometry.num_topk,
                                    .capacity = geometry.capacity,
                                    .hidden = kHidden,
                                    .dtype = DType::kF32,
                                    .weighted = true},
                                   geometry.num_ranks, nullptr));
    return result;
  }

  // What ReduceRows or RowDots, which have these arguments in common, are given.
  template <typename Args>
  Args Common() const {
    Args args = {};
    args.rows = PeerTable(rows_table.data());
    args.send_rank = ranks.send_rank.data();
    args.send_row = ranks.send_row.data();
    args.num_ranks = ranks.geometry.num_ranks;
    args.num_tokens = ranks.geometry.num_tokens;
    args.num_topk = ranks.geometry.num_topk;
    args.capacity = ranks.geometry.capacity;
    args.hidden = kHidden;
    args.dtype = DType::kF32;
    return args;
  }

  // The sums of all ranks' tokens, and behind them the products of their choices; or
  // the sums alone, in which ranks' rows pass for partial sums.
  std::vector<char> Pull(bool of_partials) const {
    const auto sums = static_cast<std::size_t>(ranks.num_tokens() * kRowBytes);
    const auto dots = static_cast<std::size_t>(ranks.num_choices()) * sizeof(float);
    std::vector<char> result(sums + dots, kUntouched);
    auto reduce = Common<ReduceRowsArgs>();
    reduce.weights = static_cast<const float*>(weights.at(0));
    reduce.out = result.data();
    reduce.of_partials = of_partials;
    reduce.partials = reduce.rows;
    EP_CHECK_RAN(cuda::ReduceRows(reduce, ranks.geometry.num_ranks, nullptr));
    if (of_partials) return result;
    auto multiply = Common<RowDotsArgs>();
    multiply.dout = dout.at(0);
    multiply.dots = reinterpret_cast<float*>(result.data() + sums);
    EP_CHECK_RAN(cuda::RowDots(multiply, ranks.geometry.num_ranks, nullptr));
    return result;
  }

  static constexpr std::size_t kGuard = 4 * kRowBytes;

  StackedRanks ranks;
  Numbers stacked_x;  // the same as x
  Numbers weights;
  Numbers dout;
  std::vector<Numbers> x;
  std::vector<Numbers> rows;
  std::vector<const void*> x_table;
  std::vector<const void*> rows_table;
  std::vector<const void*> weights_table;
};

// Leaves a row untouched of the rank that has so many rows before its own.
std::vector<char> WithoutRow(std::vector<char> result, std::int64_t rows_before,
                             std::int32_t row) {
  const std::int64_t start = (rows_before + row) * kRowBytes;
  std::fill_n(result.begin() + Exchange::kGuard + start, kRowBytes, kUntouched);
  return result;
}

EP_TEST(EntriesOutOfRangeAreLeftOut) {
  std::mt19937_64 rng(1);
  Exchange exchange(rng);
  StackedRanks& ranks = exchange.ranks;
  const std::int64_t capacity = ranks.geometry.capacity;
  const std::size_t first = Exchange::Middle(capacity);
  const std::size_t counts = Exchange::Middle(ranks.geometry.num_ranks);
  const std::int32_t received = ranks.recv_counts[counts] +
                                ranks.recv_counts[counts + 1] +
                                ranks.recv_counts[counts + 2];
  EP_CHECK(received > 3);
  for (const bool scaled : {false, true}) {
    const std::vector<char> good = exchange.Gather(scaled);
    for (std::size_t i = first; i < first + static_cast<std::size_t>(received); ++i) {
      const std::vector<char> wanted = WithoutRow(good, capacity, ranks.recv_row[i]);
      const auto check = [&](Numbers32& field, const char* name, std::int32_t value) {
        const Case which(std::string(name) + "[" + Show(i) + "] = " + Show(value));
        const std::int32_t kept = std::exchange(field[i], value);
        EP_CHECK(exchange.Gather(scaled) == wanted);
        field[i] = kept;
      };
      for (const auto value : NumbersOutside(ranks.num_choices())) {
        check(ranks.recv_choice, "recv_choice", value);
      }
      for (const auto value : NumbersOutside(capacity)) {
        check(ranks.recv_row, "recv_row", value);
      }
    }
  }
}

// Counts that cannot be spoil the rows of their rank at most.
EP_TEST(CountsThatCannotBeAreKeptInBounds) {
  std::mt19937_64 rng(2);
  Exchange exchange(rng);
  StackedRanks& ranks = exchange.ranks;
  const Geometry& geometry = ranks.geometry;
  const auto own =
      static_cast<std::ptrdiff_t>(Exchange::kGuard + geometry.capacity * kRowBytes);
  const std::int64_t own_bytes = geometry.capacity * kRowBytes;
  for (const bool scaled : {false, true}) {
    std::vector<char> good = exchange.Gather(scaled);
    std::fill_n(good.begin() + own, own_bytes, '\0');
    const auto check = [&](Numbers32& field, const char* name, std::int64_t size) {
      for (std::size_t i = Exchange::Middle(size); i < Exchange::Middle(2 * size);
           ++i) {
        for (const auto value : NumbersOutside(geometry.capacity)) {
          const Case which(std::string(name) + "[" + Show(i) + "] = " + Show(value));
          const std::int32_t kept = std::exchange(field[i], value);
          std::vector<char> got = exchange.Gather(scaled);
          std::fill_n(got.begin() + own, own_bytes, '\0');
          EP_CHECK(got == good);
          field[i] = kept;
        }
      }
    };
    check(ranks.recv_counts, "recv_counts", geometry.num_ranks);
    check(ranks.group_sizes, "group_sizes", geometry.num_local_experts);
    check(ranks.group_rows, "group_rows", geometry.num_local_experts);
  }
}

EP_TEST(EntriesWithoutChoicesAreLeftOut) {
  std::mt19937_64 rng(3);
  for (const bool has_tokens : {false, true}) {
    Exchange exchange(rng);
    exchange.ranks.geometry.num_tokens = has_tokens ? 3 : 0;
    exchange.ranks.geometry.num_topk = has_tokens ? 0 : 3;
    std::ranges::fill(exchange.ranks.group_sizes, 0);
    std::ranges::fill(exchange.ranks.group_rows, 0);
    for (const bool scaled : {false, true}) {
      const std::vector<char> got = exchange.Gather(scaled);
      const auto begin = got.begin() + Exchange::kGuard;
      EP_CHECK(std::all_of(begin, got.end() - Exchange::kGuard,
                           [](char c) { return c == '\0'; }));
    }
  }
}

// The same where all ranks' rows are filled by what each sends.
EP_TEST(ChoicesOutOfRangeAreNotSent) {
  std::mt19937_64 rng(5);
  Exchange exchange(rng);
  StackedRanks& ranks = exchange.ranks;
  const std::int64_t capacity = ranks.geometry.capacity;
  const std::int64_t own = ranks.geometry.choices_per_rank();
  for (const bool scaled : {false, true}) {
    const std::vector<char> good = exchange.Gather(scaled, true);
    EP_CHECK(good == exchange.Gather(scaled));
    for (std::size_t i = Exchange::Middle(own); i < Exchange::Middle(2 * own); ++i) {
      if (ranks.send_row[i] == kDropped) continue;
      const std::int64_t row = ranks.send_rank[i] * capacity + ranks.send_row[i];
      const std::vector<char> wanted =
          WithoutRow(good, 0, static_cast<std::int32_t>(row));
      const auto check = [&](Numbers32& field, const char* name, std::int64_t size) {
        for (const auto value : NumbersOutside(size)) {
          const Case which(std::string(name) + "[" + Show(i) + "] = " + Show(value));
          const std::int32_t kept = std::exchange(field[i], value);
          EP_CHECK(exchange.Gather(scaled, true) == wanted);
          field[i] = kept;
        }
      };
      check(ranks.send_row, "send_row", capacity);
      check(ranks.send_rank, "send_rank", ranks.geometry.num_ranks);
    }
  }
}

// What a rank's partial sums are by what its entries say: those that follow each other
// and are of one token are added up, at the row of the first that has one.
void AddPartials(const Exchange& exchange, std::size_t rank, std::vector<char>& sums) {
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
    if (token(first) == kNoToken || end == first + 1) continue;
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
          const std::vector<char> got = exchange.SumPartials();
          std::vector<char> wanted(got.size(), kUntouched);
          for (std::size_t rank = 0; rank < exchange.rows.size(); ++rank) {
            AddPartials(exchange, rank, wanted);
          }
          EP_CHECK(got == wanted);
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

// A choice whose row or rank is out of range counts as dropped.
EP_TEST(ChoicesOutOfRangeAreLeftOut) {
  std::mt19937_64 rng(4);
  Exchange exchange(rng);
  StackedRanks& ranks = exchange.ranks;
  const std::int64_t own = ranks.geometry.choices_per_rank();
  for (std::size_t i = Exchange::Middle(own); i < Exchange::Middle(2 * own); ++i) {
    const std::int32_t row = std::exchange(ranks.send_row[i], kDropped);
    const std::vector<char> wanted = exchange.Pull(false);
    const std::vector<char> of_partials = exchange.Pull(true);
    const auto check = [&](Numbers32& field, const char* name, std::int64_t size) {
      for (const auto value : NumbersOutside(size)) {
        const Case which(std::string(name) + "[" + Show(i) + "] = " + Show(value));
        const std::int32_t kept = std::exchange(field[i], value);
        EP_CHECK(exchange.Pull(false) == wanted);
        EP_CHECK(exchange.Pull(true) == of_partials);
        field[i] = kept;
      }
    };
    check(ranks.send_row, "send_row", ranks.geometry.capacity);
    ranks.send_row[i] = row;
    check(ranks.send_rank, "send_rank", ranks.geometry.num_ranks);
  }
}

}  // namespace
}  // namespace jax_ep
