// The kernel for CPUs that gathers rows, in any order of its chunks.
#include "cpu/gather_rows.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "check.h"
#include "numbers.h"
#include "plan_reference.h"
#include "run_work.h"

namespace jax_ep {
namespace {

constexpr char kUntouched = 'U';

// A byte that depends on where in which token of which rank it is.
char Payload(std::int64_t rank, std::int64_t token, std::int64_t i) {
  return static_cast<char>((rank * 8209 + token * 131 + i * 7 + i / 256) % 251);
}

// What rank `rank` pulls: every rank's tokens, each table of exactly its size.
struct Pull {
  Pull(const Geometry& g, const std::vector<std::int32_t>& choices, std::int64_t rank,
       std::int64_t row_size)
      : geometry(g),
        plan(ReferencePlans(g, choices)[static_cast<std::size_t>(rank)]),
        row_bytes(row_size),
        rows(static_cast<std::size_t>(g.capacity * row_size), kUntouched) {
    rows.reserve(1);  // A copy of no bytes wants an address, too.
    for (std::int64_t r = 0; r < g.num_ranks; ++r) {
      auto& tokens = x.emplace_back();
      tokens.reserve(1);
      for (std::int64_t t = 0; t < g.num_tokens; ++t) {
        for (std::int64_t i = 0; i < row_bytes; ++i) tokens.push_back(Payload(r, t, i));
      }
    }
    for (const auto& tokens : x) table.push_back(tokens.data());
  }

  GatherRowsArgs Args(bool zero_tail) {
    return {.x = PeerTable(table.data()),
            .weights = PeerTable(),
            .recv_choice = plan.recv_choice.data(),
            .recv_row = plan.recv_row.data(),
            .recv_counts = plan.recv_counts.data(),
            .group_sizes = plan.group_sizes.data(),
            .group_rows = plan.group_rows.data(),
            .rows = rows.data(),
            .num_ranks = geometry.num_ranks,
            .num_tokens = geometry.num_tokens,
            .num_topk = geometry.num_topk,
            .num_local_experts = geometry.num_local_experts,
            .capacity = geometry.capacity,
            .hidden = row_bytes,
            .row_bytes = row_bytes,
            .dtype = DType::kF32,
            .scaled = false,
            .zero_tail = zero_tail};
  }

  std::int64_t UsedRows() const {
    return std::accumulate(plan.group_sizes.begin(), plan.group_sizes.end(),
                           std::int64_t{0});
  }

  // The whole buffer, from the reference plan and the payload's formula.
  std::vector<char> Wanted(bool zero_tail) const {
    std::vector<char> wanted(rows.size(), kUntouched);
    const std::int64_t zeroed = zero_tail ? geometry.capacity : UsedRows();
    std::fill_n(wanted.begin(), zeroed * row_bytes, '\0');
    for (std::size_t e = 0; e < plan.recv_row.size(); ++e) {
      const std::int64_t token = plan.recv_choice[e] / geometry.num_topk;
      for (std::int64_t i = 0; i < row_bytes; ++i) {
        wanted[static_cast<std::size_t>(plan.recv_row[e] * row_bytes + i)] =
            Payload(token / geometry.num_tokens, token % geometry.num_tokens, i);
      }
    }
    return wanted;
  }

  Geometry geometry;
  RankPlan plan;
  std::int64_t row_bytes;
  std::vector<char> rows;
  std::vector<std::vector<char>> x;
  std::vector<const void*> table;
};

void CheckPull(Pull& pull, bool zero_tail, std::mt19937_64& rng) {
  const Case which(pull.geometry.Text() + " row_bytes=" + Show(pull.row_bytes));
  const GatherRowsArgs args = pull.Args(zero_tail);
  RunShuffled(cpu::GatherRowsWork(args), rng);
  const std::vector<char> wanted = pull.Wanted(zero_tail);
  for (std::int64_t row = 0; row < pull.geometry.capacity; ++row) {
    const std::int64_t start = row * pull.row_bytes;
    const bool right =
        std::equal(pull.rows.begin() + start,
                   pull.rows.begin() + start + pull.row_bytes, wanted.begin() + start);
    if (!EP_CHECK(right)) NoteFailure(__FILE__, __LINE__, "row " + Show(row));
  }
}

// Row sizes from one byte to several per chunk and more than a chunk.
EP_TEST(GatherPutsEveryTokenInItsRows) {
  std::mt19937_64 rng(1);
  for (const std::int64_t row_bytes : {0, 1, 6, 64, 1000, 40000, 140000}) {
    for (const Routing routing : kAllRoutings) {
      const bool large = row_bytes > 1000;
      Geometry geometry = {.num_ranks = 3,
                           .num_local_experts = 3,
                           .num_tokens = large ? 3 : 23,
                           .num_topk = large ? 2 : 3,
                           .capacity = 1,
                           .alignment = large ? 2 : 4};
      const auto choices = RandomChoices(geometry, routing, rng);
      const std::int64_t incoming = LargestIncoming(geometry, choices);
      const bool overflows = rng() % 3 == 0;
      geometry.capacity =
          geometry.CapacityFor(overflows ? incoming * 2 / 3 : incoming + 5);
      for (std::int64_t rank = 0; rank < geometry.num_ranks; ++rank) {
        Pull pull(geometry, choices, rank, row_bytes);
        CheckPull(pull, rank % 2 == 0, rng);
      }
    }
  }
}

EP_TEST(GatherWithoutTokensZeroes) {
  std::mt19937_64 rng(2);
  const Geometry geometry = {.num_ranks = 2,
                             .num_local_experts = 2,
                             .num_tokens = 0,
                             .num_topk = 2,
                             .capacity = 7};
  Pull pull(geometry, {}, 1, 24);
  CheckPull(pull, true, rng);
}

// A geometry whose tokens want most local experts of one rank, so that the receive list
// is full of runs of one token; chunks of 4 rows cut them anywhere.
Geometry ManyExpertsPerToken() {
  return {.num_ranks = 2,
          .num_local_experts = 6,
          .num_tokens = 5,
          .num_topk = 11,
          .capacity = 70,
          .alignment = 2};
}

constexpr std::int64_t kFourRowsPerChunk = 70000;

// Runs each chunk on an untouched buffer, to see which rows it writes.
EP_TEST(EachRowIsWrittenByOneChunk) {
  std::mt19937_64 rng(3);
  const Geometry geometry = ManyExpertsPerToken();
  const auto choices = RandomChoices(geometry, Routing::kDistinct, rng);
  Pull pull(geometry, choices, 0, kFourRowsPerChunk);
  const GatherRowsArgs args = pull.Args(true);
  const Work work = cpu::GatherRowsWork(args);
  EP_CHECK(work.num_chunks > 12);
  std::vector<int> writes(static_cast<std::size_t>(geometry.capacity));
  for (std::int64_t chunk = 0; chunk < work.num_chunks; ++chunk) {
    std::ranges::fill(pull.rows, kUntouched);
    RunChunk(work, chunk);
    for (std::size_t row = 0; row < writes.size(); ++row) {
      const auto start =
          pull.rows.begin() + static_cast<std::int64_t>(row) * kFourRowsPerChunk;
      const bool touched = std::any_of(start, start + kFourRowsPerChunk,
                                       [](char c) { return c != kUntouched; });
      if (touched) ++writes[row];
    }
  }
  EP_CHECK_EQ(writes, std::vector<int>(writes.size(), 1));
}

EP_TEST(ChunksMayRunAtTheSameTime) {
  std::mt19937_64 rng(4);
  const Geometry geometry = ManyExpertsPerToken();
  for (int i = 0; i < 4; ++i) {
    const auto choices = RandomChoices(geometry, Routing::kDistinct, rng);
    Pull pull(geometry, choices, i % 2, kFourRowsPerChunk);
    const GatherRowsArgs args = pull.Args(true);
    RunAtOnce(cpu::GatherRowsWork(args));
    EP_CHECK(pull.rows == pull.Wanted(true));
  }
}

// Large outputs are written past the caches and on huge pages.
EP_TEST(GatherStreamsLargeOutputs) {
  std::mt19937_64 rng(5);
  const Geometry geometry = {.num_ranks = 2,
                             .num_local_experts = 2,
                             .num_tokens = 150,
                             .num_topk = 2,
                             .capacity = 1030,
                             .alignment = 4};
  const auto choices = RandomChoices(geometry, Routing::kUniform, rng);
  for (const std::int64_t row_bytes : {16384, 16390}) {
    Pull pull(geometry, choices, 0, row_bytes);
    CheckPull(pull, true, rng);
  }
}

void CheckScaled(DType dtype, std::int64_t hidden, std::mt19937_64& rng) {
  const Geometry geometry = {.num_ranks = 2,
                             .num_local_experts = 2,
                             .num_tokens = 6,
                             .num_topk = 3,
                             .capacity = 30,
                             .alignment = 4};
  const auto choices = RandomChoices(geometry, Routing::kHoles, rng);
  const RankPlan plan = ReferencePlans(geometry, choices)[1];
  std::vector<Numbers> x(2, Numbers(dtype, geometry.num_tokens * hidden));
  std::vector<Numbers> weights(2, Numbers(DType::kF32, geometry.choices_per_rank()));
  for (auto* both : {&x, &weights}) {
    for (Numbers& numbers : *both) numbers.FillRandomly(rng);
  }
  const void* const x_table[] = {x[0].at(0), x[1].at(0)};
  const void* const weights_table[] = {weights[0].at(0), weights[1].at(0)};
  Numbers rows(dtype, geometry.capacity * hidden);
  rows.Fill(7);
  const GatherRowsArgs args = {.x = PeerTable(x_table),
                               .weights = PeerTable(weights_table),
                               .recv_choice = plan.recv_choice.data(),
                               .recv_row = plan.recv_row.data(),
                               .recv_counts = plan.recv_counts.data(),
                               .group_sizes = plan.group_sizes.data(),
                               .group_rows = plan.group_rows.data(),
                               .rows = rows.at(0),
                               .num_ranks = geometry.num_ranks,
                               .num_tokens = geometry.num_tokens,
                               .num_topk = geometry.num_topk,
                               .num_local_experts = geometry.num_local_experts,
                               .capacity = geometry.capacity,
                               .hidden = hidden,
                               .row_bytes = hidden * ByteWidth(dtype),
                               .dtype = dtype,
                               .scaled = true,
                               .zero_tail = true};
  RunShuffled(cpu::GatherRowsWork(args), rng);
  Numbers wanted(dtype, geometry.capacity * hidden);
  for (std::size_t e = 0; e < plan.recv_row.size(); ++e) {
    const std::int64_t choice = plan.recv_choice[e];
    const auto source = static_cast<std::size_t>(choice / geometry.choices_per_rank());
    const std::int64_t own = choice % geometry.choices_per_rank();
    const auto weight = static_cast<float>(weights[source][own]);
    for (std::int64_t h = 0; h < hidden; ++h) {
      const double value = x[source][own / geometry.num_topk * hidden + h];
      wanted.Set(plan.recv_row[e] * hidden + h, ReferenceProduct(dtype, weight, value));
    }
  }
  for (std::int64_t i = 0; i < rows.size(); ++i) {
    EP_CHECK(SameNumber(rows[i], wanted[i]));
  }
}

EP_TEST(GatherScalesByTheChoicesWeight) {
  std::mt19937_64 rng(6);
  for (const DType dtype : kAllDTypes) {
    for (const std::int64_t hidden : {1, 33, 20000}) {
      const Case which(std::string(Name(dtype)) + " " + Show(hidden));
      CheckScaled(dtype, hidden, rng);
    }
  }
}

}  // namespace
}  // namespace jax_ep
