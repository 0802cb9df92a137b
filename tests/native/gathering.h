// The arguments of gathering kernels, with buffers of exactly their sizes.

#ifndef JAX_EP_TESTS_NATIVE_GATHERING_H_
#define JAX_EP_TESTS_NATIVE_GATHERING_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "cpu/gather_rows.h"
#include "plan_reference.h"
#include "run_work.h"

namespace jax_ep {

// What one rank pulls, by a plan that a test may spoil. Every buffer is of exact size,
// so that AddressSanitizer sees what is read and written beside it.
struct Gathering {
  static constexpr char kUntouched = 'U';

  Gathering(const Geometry& g, const std::vector<std::int32_t>& choices,
            std::int64_t rank, std::int64_t row_size, std::mt19937_64& rng)
      : geometry(g),
        plan(ReferencePlans(g, choices)[static_cast<std::size_t>(rank)]),
        row_bytes(row_size),
        rows(static_cast<std::size_t>(g.capacity * row_size), kUntouched) {
    plan.recv_choice.resize(static_cast<std::size_t>(g.capacity), 1 << 30);
    plan.recv_row.resize(static_cast<std::size_t>(g.capacity), 1 << 30);
    plan.recv_choice.shrink_to_fit();
    plan.recv_row.shrink_to_fit();
    const auto small = [&] { return static_cast<float>(rng() % 1000) - 500; };
    for (std::int64_t r = 0; r < g.num_ranks; ++r) {
      x.emplace_back(static_cast<std::size_t>(g.num_tokens * row_bytes / 4));
      weights.emplace_back(static_cast<std::size_t>(g.choices_per_rank()));
      std::ranges::generate(x.back(), small);
      std::ranges::generate(weights.back(), small);
    }
    for (const auto& tokens : x) x_table.push_back(tokens.data());
    for (const auto& own : weights) weights_table.push_back(own.data());
  }

  // Of rows of float32.
  GatherRowsArgs Args(bool scaled, cpu::PlanFault* fault) {
    return {.x = PeerTable(x_table.data()),
            .weights = PeerTable(weights_table.data()),
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
            .hidden = row_bytes / 4,
            .row_bytes = row_bytes,
            .dtype = DType::kF32,
            .scaled = scaled,
            .zero_tail = true,
            .fault = fault};
  }

  // Returns the rows, of which none was touched before.
  std::vector<char> Run(bool scaled, cpu::PlanFault* fault, std::mt19937_64& rng) {
    std::ranges::fill(rows, kUntouched);
    const GatherRowsArgs args = Args(scaled, fault);
    RunShuffled(cpu::GatherRowsWork(args), rng);
    return rows;
  }

  Geometry geometry;
  RankPlan plan;
  std::int64_t row_bytes;
  std::vector<char> rows;
  std::vector<std::vector<float>> x;
  std::vector<std::vector<float>> weights;
  std::vector<const void*> x_table;
  std::vector<const void*> weights_table;
};

}  // namespace jax_ep

#endif  // JAX_EP_TESTS_NATIVE_GATHERING_H_
