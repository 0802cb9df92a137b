// The emulated kernels that gather rows, against those for CPUs.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/gather_rows.h"
#include "cuda/gather_rows.h"
#include "cuda/gather_scaled.h"
#include "cuda_launches.h"
#include "numbers.h"
#include "plan_reference.h"
#include "run_work.h"
#include "stacked_ranks.h"

namespace jax_ep {
namespace {

GatherRowsArgs Arguments(const StackedRanks& ranks, bool zero_tail) {
  const Geometry& geometry = ranks.geometry;
  return {.x = PeerTable(),
          .weights = PeerTable(),
          .recv_choice = ranks.recv_choice.data(),
          .recv_row = ranks.recv_row.data(),
          .recv_counts = ranks.recv_counts.data(),
          .group_sizes = ranks.group_sizes.data(),
          .group_rows = ranks.group_rows.data(),
          .rows = nullptr,
          .num_ranks = geometry.num_ranks,
          .num_tokens = geometry.num_tokens,
          .num_topk = geometry.num_topk,
          .num_local_experts = geometry.num_local_experts,
          .capacity = geometry.capacity,
          .hidden = 0,
          .row_bytes = 0,
          .dtype = DType::kF32,
          .scaled = false,
          .zero_tail = zero_tail,
          .send_rank = ranks.send_rank.data(),
          .send_row = ranks.send_row.data()};
}

// Has the kernels go by the receive lists, whatever else they are given.
void TakeSendLists(GatherRowsArgs& args) {
  args.send_rank = nullptr;
  args.send_row = nullptr;
}

// What the CPU's kernel makes of `rows`.
void GatherOnCpu(GatherRowsArgs first, Output<char>& rows, std::mt19937_64& rng) {
  first.rows = rows.data();
  for (std::int64_t rank = 0; rank < first.num_ranks; ++rank) {
    const GatherRowsArgs args = first.OfStacked(rank);
    RunShuffled(cpu::GatherRowsWork(args), rng);
  }
}

void CheckCopies(const StackedRanks& ranks, std::int64_t row_bytes, bool zero_tail,
                 std::mt19937_64& rng) {
  const std::uint64_t seed = rng();
  const Case which(ranks.geometry.Text() + " row_bytes=" + Show(row_bytes) +
                   " seed=" + Show(seed));
  emulation::SetSeed(seed);
  std::vector<char> x(static_cast<std::size_t>(ranks.num_tokens() * row_bytes));
  x.reserve(1);  // A copy of no bytes wants an address, too.
  for (char& byte : x) byte = static_cast<char>(rng());
  const StackedPeers peers(x.data(), ranks.geometry.num_tokens * row_bytes,
                           ranks.geometry.num_ranks, seed % 2 == 0);
  Output<char> rows(ranks.num_rows() * row_bytes, rng);
  Output<char> wanted = rows;
  GatherRowsArgs args = Arguments(ranks, zero_tail);
  args.x = peers.table();
  args.row_bytes = row_bytes;
  args.rows = rows.data();
  if (rng() % 4 == 0) TakeSendLists(args);
  if (!EP_CHECK_RAN(cuda::GatherRows(args, ranks.geometry.num_ranks, nullptr))) return;
  GatherOnCpu(args, wanted, rng);
  for (std::int64_t row = 0; row < ranks.num_rows() && row_bytes > 0; ++row) {
    const char* got = rows.data() + row * row_bytes;
    const bool right =
        std::equal(got, got + row_bytes, wanted.data() + row * row_bytes);
    if (!EP_CHECK(right)) NoteFailure(__FILE__, __LINE__, "row " + Show(row));
  }
  EP_CHECK(rows.IsIntactBehind());
}

void CheckScaled(const StackedRanks& ranks, DType dtype, std::int64_t hidden,
                 bool zero_tail, std::mt19937_64& rng) {
  const std::uint64_t seed = rng();
  const Case which(std::string(Name(dtype)) + " H=" + Show(hidden) + " " +
                   ranks.geometry.Text() + " seed=" + Show(seed));
  emulation::SetSeed(seed);
  const std::int64_t row_bytes = hidden * ByteWidth(dtype);
  Numbers x(dtype, ranks.num_tokens() * hidden);
  Numbers weights(DType::kF32, ranks.num_choices());
  for (Numbers* numbers : {&x, &weights}) {
    numbers->FillRandomly(rng);
    AddSpecials(*numbers, rng);
  }
  const std::int64_t num_ranks = ranks.geometry.num_ranks;
  const StackedPeers tokens(x.at(0), ranks.geometry.num_tokens * row_bytes, num_ranks,
                            seed % 2 == 0);
  const StackedPeers scales(weights.at(0), ranks.geometry.choices_per_rank() * 4,
                            num_ranks, seed % 3 == 0);
  Output<char> rows(ranks.num_rows() * row_bytes, rng);
  Output<char> wanted = rows;
  GatherRowsArgs args = Arguments(ranks, zero_tail);
  args.x = tokens.table();
  args.weights = scales.table();
  args.rows = rows.data();
  args.hidden = hidden;
  args.row_bytes = row_bytes;
  args.dtype = dtype;
  args.scaled = true;
  if (rng() % 4 == 0) TakeSendLists(args);
  if (!EP_CHECK_RAN(cuda::GatherScaled(args, num_ranks, nullptr))) return;
  GatherOnCpu(args, wanted, rng);
  CheckSameNumbers(dtype, rows.data(), wanted.data(), ranks.num_rows() * hidden,
                   hidden);
  EP_CHECK(rows.IsIntactBehind());
}

// Runs check(ranks, zero_tail) for each routing, with room for all and without.
template <typename Check>
void ForRanks(std::mt19937_64& rng, Check check) {
  for (const Routing routing : kAllRoutings) {
    for (const std::int64_t capacity : {21, 90}) {
      const StackedRanks ranks({.num_ranks = 3,
                                .num_local_experts = 3,
                                .num_tokens = 7,
                                .num_topk = 4,
                                .capacity = capacity,
                                .alignment = 4},
                               routing, rng);
      check(ranks, rng() % 2 == 0);
    }
  }
}

// Rows of all the units that the kernel copies, and of more than a warp holds at once.
EP_TEST(CopiesRowsOfAnySize) {
  std::mt19937_64 rng(1);
  for (const std::int64_t row_bytes :
       {0, 1, 2, 3, 4, 6, 8, 12, 16, 30, 32, 48, 131, 262, 1040, 2052, 4112, 8224}) {
    ForRanks(rng, [&](const StackedRanks& ranks, bool zero_tail) {
      CheckCopies(ranks, row_bytes, zero_tail, rng);
    });
  }
}

EP_TEST(ScalesRowsByTheChoicesWeight) {
  std::mt19937_64 rng(2);
  for (const DType dtype : kAllDTypes) {
    for (const std::int64_t hidden : {0, 1, 3, 8, 301, 302, 2056}) {
      ForRanks(rng, [&](const StackedRanks& ranks, bool zero_tail) {
        CheckScaled(ranks, dtype, hidden, zero_tail, rng);
      });
    }
  }
}

EP_TEST(GathersWithoutTokens) {
  std::mt19937_64 rng(3);
  const StackedRanks ranks(
      {.num_ranks = 2, .num_local_experts = 2, .num_tokens = 0, .capacity = 37},
      Routing::kUniform, rng);
  for (const bool zero_tail : {false, true}) {
    CheckCopies(ranks, 24, zero_tail, rng);
    CheckScaled(ranks, DType::kBF16, 24, zero_tail, rng);
  }
}

// Sums of more ranks and experts than a warp has lanes, by one rank that asks many.
EP_TEST(GathersForManyRanksAndExperts) {
  std::mt19937_64 rng(4);
  for (const std::int64_t num_ranks : {1, 40}) {
    const StackedRanks ranks({.num_ranks = num_ranks,
                              .num_local_experts = num_ranks == 1 ? 70 : 2,
                              .num_tokens = num_ranks == 1 ? 60 : 3,
                              .num_topk = 2,
                              .capacity = 400,
                              .alignment = 4},
                             Routing::kUniform, rng);
    CheckCopies(ranks, 8, true, rng);
    CheckScaled(ranks, DType::kF32, 5, false, rng);
  }
}

// Tokens that more rows want than a warp has lanes: each entry but the first is
// another's, up to any number of them.
EP_TEST(GathersATokenIntoManyRows) {
  std::mt19937_64 rng(5);
  for (const std::int64_t topk : {30, 31, 32, 33, 63, 64, 100}) {
    for (const Routing routing : {Routing::kOneExpert, Routing::kHoles}) {
      const StackedRanks ranks({.num_ranks = 2,
                                .num_local_experts = 2,
                                .num_tokens = 3,
                                .num_topk = topk,
                                .capacity = 500},
                               routing, rng);
      CheckCopies(ranks, 36, true, rng);
      CheckScaled(ranks, DType::kF16, 9, true, rng);
    }
  }
}

EP_TEST(RefusesRowsOfTooManyBytes) {
  std::mt19937_64 rng(6);
  const StackedRanks ranks({}, Routing::kUniform, rng);
  GatherRowsArgs args = Arguments(ranks, true);
  args.row_bytes = std::int64_t{1} << 31;
  for (const auto gather : {cuda::GatherRows, cuda::GatherScaled}) {
    EP_CHECK_EQ(gather(args, 1, nullptr), cudaErrorInvalidValue);
  }
}

}  // namespace
}  // namespace jax_ep
