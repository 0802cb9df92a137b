// Tables of peers' addresses on their way to an emulated kernel, which may start after
// the function that launched it has returned.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "common/gather_rows.h"
#include "common/reduce_rows.h"
#include "common/row_dots.h"
#include "cuda/gather_rows.h"
#include "cuda/gather_scaled.h"
#include "cuda/peers.h"
#include "cuda/plan.h"
#include "cuda/reduce_rows.h"
#include "cuda/row_dots.h"
#include "cuda_launches.h"
#include "numbers.h"
#include "plan_reference.h"
#include "stacked_ranks.h"

namespace jax_ep {
namespace {

constexpr std::int64_t kMany = cuda::kMaxPeers;

using Addresses = std::vector<const void*>;

Addresses RandomAddresses(std::int64_t count, std::mt19937_64& rng) {
  Addresses addresses;
  for (std::int64_t i = 0; i < count; ++i) {
    addresses.push_back(reinterpret_cast<const void*>(rng()));
  }
  return addresses;
}

// A kernel's parameters keep what the arrays held when it was launched.
EP_TEST(ParametersHoldTheAddresses) {
  std::mt19937_64 rng(1);
  Addresses x = RandomAddresses(kMany, rng);
  Addresses weights = RandomAddresses(kMany, rng);
  const Addresses x_before = x;
  const Addresses weights_before = weights;
  GatherRowsArgs args = {};
  args.x = PeerTable(x.data());
  args.weights = PeerTable(weights.data());
  cuda::WithPeers<GatherRowsArgs, &GatherRowsArgs::x, &GatherRowsArgs::weights> packed;
  EP_CHECK(packed.Pack(args, kMany));
  std::ranges::fill(x, nullptr);
  std::ranges::fill(weights, nullptr);
  const auto moved = packed;  // as a launch does
  for (const GatherRowsArgs& bound : {moved.OfStacked(0), moved.Bound()}) {
    for (std::int64_t rank = 0; rank < kMany; ++rank) {
      const auto i = static_cast<std::size_t>(rank);
      EP_CHECK(bound.x[rank] == x_before[i]);
      EP_CHECK(bound.weights[rank] == weights_before[i]);
    }
  }
}

// Each table of a kernel is of either form by itself.
EP_TEST(StridesStayAsTheyAre) {
  std::mt19937_64 rng(2);
  const std::vector<char> buffer(1000);
  const Addresses addresses = RandomAddresses(5, rng);
  GatherRowsArgs args = {};
  args.x = PeerTable(buffer.data(), 100);
  args.weights = PeerTable(addresses.data());
  cuda::WithPeers<GatherRowsArgs, &GatherRowsArgs::x, &GatherRowsArgs::weights> packed;
  EP_CHECK(packed.Pack(args, 5));
  const GatherRowsArgs bound = packed.OfStacked(0);
  for (std::int64_t rank = 0; rank < 5; ++rank) {
    EP_CHECK(bound.x[rank] == buffer.data() + 100 * rank);
    EP_CHECK(bound.weights[rank] == addresses[static_cast<std::size_t>(rank)]);
  }
}

// One rank of many, whose peers' buffers lie anywhere, and what its kernels make of
// them.
struct OneRank {
  OneRank(std::int64_t num_ranks, std::mt19937_64& rng)
      : ranks({.num_ranks = num_ranks, .num_topk = 3, .capacity = 8}, Routing::kUniform,
              rng),
        dout(DType::kF32, kHidden),
        rows(ranks.geometry.capacity * kHidden, rng),
        out(kHidden, rng),
        dots(ranks.geometry.num_topk, rng),
        scaled_rows(rows) {
    dout.FillRandomly(rng);
    for (std::int64_t rank = 0; rank < num_ranks; ++rank) {
      x.emplace_back(DType::kF32, kHidden);
      weights.emplace_back(DType::kF32, ranks.geometry.num_topk);
      peers_rows.emplace_back(DType::kF32, ranks.geometry.capacity * kHidden);
      for (auto* numbers : {&x, &weights, &peers_rows}) {
        numbers->back().FillRandomly(rng);
      }
    }
  }

  static Addresses AddressesOf(const std::vector<Numbers>& buffers) {
    Addresses addresses;
    for (const Numbers& numbers : buffers) addresses.push_back(numbers.at(0));
    return addresses;
  }

  // What the kernels say when they are given arrays of addresses that go at once.
  std::vector<cudaError_t> Gather() {
    const Addresses tokens = AddressesOf(x);
    const Addresses scales = AddressesOf(weights);
    GatherRowsArgs args = {.x = PeerTable(tokens.data()),
                           .weights = PeerTable(scales.data()),
                           .recv_choice = ranks.recv_choice.data(),
                           .recv_row = ranks.recv_row.data(),
                           .recv_counts = ranks.recv_counts.data(),
                           .group_sizes = ranks.group_sizes.data(),
                           .group_rows = ranks.group_rows.data(),
                           .rows = rows.data(),
                           .num_ranks = ranks.geometry.num_ranks,
                           .num_tokens = 1,
                           .num_topk = ranks.geometry.num_topk,
                           .num_local_experts = 1,
                           .capacity = ranks.geometry.capacity,
                           .hidden = kHidden,
                           .row_bytes = kHidden * 4,
                           .dtype = DType::kF32,
                           .scaled = false,
                           .zero_tail = true};
    const cudaError_t copied = cuda::GatherRows(args, 1, nullptr);
    args.scaled = true;
    args.rows = scaled_rows.data();
    return {copied, cuda::GatherScaled(args, 1, nullptr)};
  }

  template <typename Args>
  Args Pulling(const Addresses& theirs) const {
    Args args = {};
    args.rows = PeerTable(theirs.data());
    args.send_rank = ranks.send_rank.data();
    args.send_row = ranks.send_row.data();
    args.num_ranks = ranks.geometry.num_ranks;
    args.num_tokens = 1;
    args.num_topk = ranks.geometry.num_topk;
    args.capacity = ranks.geometry.capacity;
    args.hidden = kHidden;
    args.dtype = DType::kF32;
    return args;
  }

  std::vector<cudaError_t> Pull() {
    const Addresses theirs = AddressesOf(peers_rows);
    auto reduce = Pulling<ReduceRowsArgs>(theirs);
    reduce.out = out.data();
    auto multiply = Pulling<RowDotsArgs>(theirs);
    multiply.dout = dout.at(0);
    multiply.dots = dots.data();
    return {cuda::ReduceRows(reduce, 1, nullptr), cuda::RowDots(multiply, 1, nullptr)};
  }

  void CheckGathered() const {
    const Geometry& g = ranks.geometry;
    std::int64_t entries = 0;
    for (std::int64_t rank = 0; rank < g.num_ranks; ++rank) {
      entries += ranks.recv_counts[static_cast<std::size_t>(rank)];
    }
    EP_CHECK(entries > 0);
    for (std::int64_t entry = 0; entry < entries; ++entry) {
      const auto i = static_cast<std::size_t>(entry);
      const auto source =
          static_cast<std::size_t>(ranks.recv_choice[i] / g.choices_per_rank());
      const double weight = weights[source][ranks.recv_choice[i] % g.num_topk];
      for (std::int64_t h = 0; h < kHidden; ++h) {
        const std::int64_t at = ranks.recv_row[i] * kHidden + h;
        const double token = x[source][h];
        EP_CHECK(SameNumber(rows.data()[at], token));
        EP_CHECK(SameNumber(
            scaled_rows.data()[at],
            ReferenceProduct(DType::kF32, static_cast<float>(weight), token)));
      }
    }
  }

  void CheckPulled() const {
    const std::int64_t num_topk = ranks.geometry.num_topk;
    std::vector<Summand> summands;
    for (std::int64_t k = 0; k < num_topk; ++k) {
      const auto i = static_cast<std::size_t>(k);
      EP_CHECK(ranks.send_row[i] >= 0);
      const Numbers& theirs = peers_rows[static_cast<std::size_t>(ranks.send_rank[i])];
      const std::int64_t start = ranks.send_row[i] * kHidden;
      summands.push_back(
          {.rows = &theirs, .start = start, .weight = 1, .rank = ranks.send_rank[i]});
      EP_CHECK(dots.data()[k] == ReferenceDot(theirs, start, dout, 0, kHidden));
    }
    std::ranges::stable_sort(summands, {}, &Summand::rank);
    for (std::int64_t h = 0; h < kHidden; ++h) {
      EP_CHECK(SameNumber(out.data()[h], ReferenceSum(DType::kF32, summands, h)));
    }
  }

  static constexpr std::int64_t kHidden = 4;

  StackedRanks ranks;
  std::vector<Numbers> x;
  std::vector<Numbers> weights;
  std::vector<Numbers> peers_rows;
  Numbers dout;
  Output<float> rows;
  Output<float> out;
  Output<float> dots;
  Output<float> scaled_rows;
};

EP_TEST(PullsFromAsManyPeersAsThereIsRoomFor) {
  std::mt19937_64 rng(3);
  OneRank rank(kMany, rng);
  for (const cudaError_t error : rank.Gather()) EP_CHECK_RAN(error);
  rank.CheckGathered();
  for (const cudaError_t error : rank.Pull()) EP_CHECK_RAN(error);
  rank.CheckPulled();
}

EP_TEST(RefusesMorePeersThanThereIsRoomFor) {
  std::mt19937_64 rng(4);
  OneRank rank(kMany + 1, rng);
  for (const auto& errors : {rank.Gather(), rank.Pull()}) {
    for (const cudaError_t error : errors) EP_CHECK_EQ(error, cudaErrorInvalidValue);
  }
  const std::vector<std::int32_t> choices(kMany + 1);
  const Addresses addresses(kMany + 1, choices.data());
  PlanArgs args = {};
  args.topk_idx = PeerTable(addresses.data());
  args.num_ranks = args.num_experts = kMany + 1;
  args.num_tokens = args.num_topk = args.capacity = args.alignment = 1;
  std::vector<std::int32_t> workspace(
      static_cast<std::size_t>(cuda::PlanWorkspace(args)));
  EP_CHECK_EQ(cuda::MakePlans(args, {}, {}, workspace.data(), nullptr),
              cudaErrorInvalidValue);
}

}  // namespace
}  // namespace jax_ep
