// Plans that hold anything, and what the kernels for GPUs are given beside them.
#ifndef JAX_EP_TESTS_NATIVE_CUDA_BAD_PLAN_H_
#define JAX_EP_TESTS_NATIVE_CUDA_BAD_PLAN_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "bad_plan.h"
#include "check.h"
#include "common/partial_sums.h"
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

using Numbers32 = std::vector<std::int32_t>;

inline constexpr std::int64_t kHidden = 4;
inline constexpr std::int64_t kRowBytes = kHidden * 4;
inline constexpr char kUntouched = 'U';

// The operands and results of all kernels, and the plans of stacked ranks, of which a
// test spoils those of the middle one. Peers' buffers are of exact size and lie apart,
// the results have a guard on both sides, so that what is beside them is seen even
// without a sanitizer.
struct Exchange {
  explicit Exchange(std::mt19937_64& rng, std::int64_t capacity = 14)
      : ranks({.num_ranks = 3,
               .num_local_experts = 2,
               .num_tokens = 5,
               .num_topk = 3,
               .capacity = capacity,
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

  // The partial sums of all ranks' rows, of several rows each or of all.
  std::vector<char> SumPartials(bool all) const {
    const Geometry& geometry = ranks.geometry;
    const auto size = static_cast<std::size_t>(ranks.num_rows() * kRowBytes);
    // One behind the other, as the kernel knows only its own rank's.
    std::vector<char> own(size);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      std::memcpy(own.data() + i * size / rows.size(), rows[i].at(0),
                  size / rows.size());
    }
    const auto sums = static_cast<std::size_t>(geometry.num_ranks *
                                               NumPartials(geometry) * kRowBytes);
    std::vector<char> result(sums + 2 * kGuard, kUntouched);
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
                                    .weighted = true,
                                    .all = all},
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
  std::vector<char> Pull(Pulled pulled) const {
    const auto sums = static_cast<std::size_t>(ranks.num_tokens() * kRowBytes);
    const auto dots = static_cast<std::size_t>(ranks.num_choices()) * sizeof(float);
    std::vector<char> result(sums + dots, kUntouched);
    auto reduce = Common<ReduceRowsArgs>();
    reduce.weights = static_cast<const float*>(weights.at(0));
    reduce.out = result.data();
    reduce.pulled = pulled;
    reduce.partials = reduce.rows;
    EP_CHECK_RAN(cuda::ReduceRows(reduce, ranks.geometry.num_ranks, nullptr));
    if (pulled != Pulled::kRows) return result;
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

}  // namespace jax_ep

#endif  // JAX_EP_TESTS_NATIVE_CUDA_BAD_PLAN_H_
