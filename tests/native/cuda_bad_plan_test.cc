// What the kernels for GPUs make of plans that hold anything.
#include "cuda_bad_plan.h"

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
#include "cuda/reduce_rows.h"
#include "cuda_launches.h"
#include "plan_reference.h"
#include "stacked_ranks.h"

namespace jax_ep {
namespace {

constexpr Pulled kAllPulled[] = {Pulled::kRows, Pulled::kSumsOfSeveral, Pulled::kSums};

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
    exchange.ranks.geometry.num_tokens = has_tokens ? 5 : 0;
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

// A choice whose row or rank is out of range counts as dropped.
EP_TEST(ChoicesOutOfRangeAreLeftOut) {
  std::mt19937_64 rng(4);
  Exchange exchange(rng);
  StackedRanks& ranks = exchange.ranks;
  const std::int64_t own = ranks.geometry.choices_per_rank();
  for (std::size_t i = Exchange::Middle(own); i < Exchange::Middle(2 * own); ++i) {
    const std::int32_t row = std::exchange(ranks.send_row[i], kDropped);
    std::vector<std::vector<char>> wanted;
    for (const Pulled pulled : kAllPulled) wanted.push_back(exchange.Pull(pulled));
    const auto check = [&](Numbers32& field, const char* name, std::int64_t size) {
      for (const auto value : NumbersOutside(size)) {
        const Case which(std::string(name) + "[" + Show(i) + "] = " + Show(value));
        const std::int32_t kept = std::exchange(field[i], value);
        for (std::size_t j = 0; j < wanted.size(); ++j) {
          EP_CHECK(exchange.Pull(kAllPulled[j]) == wanted[j]);
        }
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
