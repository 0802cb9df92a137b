// Laying out a plan: turning counts into where things start, and writing what is known
// before any choice is placed.

#ifndef JAX_EP_FFI_CUDA_PLAN_LAYOUT_H_
#define JAX_EP_FFI_CUDA_PLAN_LAYOUT_H_

#include <cstdint>

#include "cuda/plan_tables.h"

namespace jax_ep::cuda {

// The warps of a block that do a part of this together, when all blocks share it: each
// then sums a run of rows. Else one warp does a part alone.
inline constexpr int kLayOutWarps = 32;
inline constexpr int kLayOutThreads = kLayOutWarps * kWarpSize;

// What warps that work together tell each other: each lane's sum. One alone needs none.
struct ColumnSums {
  std::int32_t of_warp[kLayOutWarps][kWarpSize];
};

// Up to 32 neighbouring columns of a table, a column per lane, summed by kTogether
// warps.
template <int kTogether>
class Columns {
 public:
  __device__ Columns(const PlanTables& tables, std::int64_t first, std::int64_t most,
                     ColumnSums* sums)
      : stride_(tables.columns),
        first_(first),
        count_(static_cast<int>(min(most, std::int64_t{kWarpSize}))),
        sums_(sums) {
    const std::int64_t run = (tables.rows() + kTogether - 1) / kTogether;
    begin_ = Warp() * run;
    end_ = min(begin_ + run, tables.rows());
  }

  // Which of those that work together this warp is.
  __device__ static int Warp() { return kTogether == 1 ? 0 : WarpInBlock(); }
  // Waits for these, and for what they wrote.
  __device__ static void Meet() {
    if constexpr (kTogether == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  __device__ int count() const { return count_; }
  __device__ bool is_here() const { return Lane() < count_; }

  // Sums this lane's column. Afterwards `before` is the sum of the warps' rows before.
  __device__ std::int32_t Sum(const std::int32_t* table, std::int32_t& before) {
    const std::int32_t* from = table + begin_ * stride_ + first_ + Lane();
    std::int32_t sum = 0;
#pragma unroll 8
    for (std::int64_t row = begin_; row < end_; ++row, from += stride_) {
      if (is_here()) sum += *from;
    }
    before = 0;
    if constexpr (kTogether == 1) return sum;
    Meet();  // the sums of the columns before have been read
    sums_->of_warp[Warp()][Lane()] = sum;
    Meet();
    std::int32_t total = 0;
    for (int warp = 0; warp < kTogether; ++warp) {
      if (warp == Warp()) before = total;
      total += sums_->of_warp[warp][Lane()];
    }
    return total;
  }

  // Writes the sums of the rows before each, maybe to where they were; returns the
  // column's sum.
  __device__ std::int32_t Scan(const std::int32_t* table, std::int32_t* scanned) {
    std::int32_t before = 0;
    const std::int32_t total = Sum(table, before);
    const std::int64_t start = begin_ * stride_ + first_ + Lane();
    const std::int32_t* from = table + start;
    std::int32_t* to = scanned + start;
#pragma unroll 8
    for (std::int64_t row = begin_; row < end_; ++row) {
      if (is_here()) {
        const std::int32_t here = *from;
        *to = before;
        before += here;
      }
      from += stride_;
      to += stride_;
    }
    return total;
  }

 private:
  std::int64_t stride_;
  std::int64_t first_;
  int count_;
  ColumnSums* sums_;
  std::int64_t begin_;  // rows of this warp
  std::int64_t end_;
};

// Lays out the groups of a rank's experts: all ranks that send it something ask where
// these start.
template <int kTogether>
__device__ void LayOutGroups(const PlanTables& tables, const std::int32_t* counts,
                             std::int64_t dest, ColumnSums* sums) {
  const std::int64_t num_local = tables.args.num_local_experts();
  const auto alignment = static_cast<std::int32_t>(tables.args.alignment);
  const bool is_wanted = tables.IsWanted(dest);
  std::int64_t start = 0;
  for (std::int64_t e = 0; e < num_local; e += kWarpSize) {
    Columns<kTogether> columns(tables, dest * num_local + e, num_local - e, sums);
    const std::int32_t rows = columns.Scan(counts, tables.placed);
    if (columns.Warp() != 0) continue;
    const std::int32_t size =
        columns.is_here() ? (rows + alignment - 1) / alignment * alignment : 0;
    const std::int64_t end = start + WarpScan(size);
    if (columns.is_here()) {
      tables.group_start[dest * num_local + e + Lane()] =
          static_cast<std::int32_t>(end - size);
    }
    if (columns.is_here() && is_wanted) {
      const PlanArrays plan = tables.OutputsOf(dest);
      plan.group_rows[e + Lane()] = rows;
      plan.group_sizes[e + Lane()] = size;
    }
    start = __shfl_sync(kAllLanes, end, kWarpSize - 1);
  }
}

// Lays out the receive lists of up to 32 ranks.
template <int kTogether>
__device__ void LayOutReceived(const PlanTables& tables, const std::int32_t* counts,
                               std::int64_t first, ColumnSums* sums) {
  const std::int64_t num_ranks = tables.args.num_ranks;
  Columns<kTogether> columns(tables, tables.DestColumn(first), num_ranks - first, sums);
  const std::int32_t received = columns.Scan(counts, tables.placed);
  columns.Meet();
  const std::int64_t dest = first + Lane();
  if (!columns.is_here() || !tables.IsWanted(dest)) return;
  const std::int32_t* before = tables.placed + tables.DestColumn(dest);
  const std::int64_t source_stride = tables.tiles_per_source * tables.columns;
  const PlanArrays plan = tables.OutputsOf(dest);
  for (std::int64_t s = columns.Warp(); s < num_ranks; s += kTogether) {
    const std::int32_t end =
        s + 1 < num_ranks ? before[(s + 1) * source_stride] : received;
    plan.recv_counts[s] = end - before[s * source_stride];
  }
}

// Tells all outputs how many choices name up to 32 experts.
template <int kTogether>
__device__ void TellLoads(const PlanTables& tables, std::int64_t first,
                          ColumnSums* sums) {
  Columns<kTogether> columns(tables, first, tables.args.num_experts - first, sums);
  std::int32_t before = 0;
  const std::int32_t load = columns.Sum(tables.asked, before);
  if (!columns.is_here()) return;
  for (std::int64_t i = columns.Warp(); i < tables.ranks.num_stacked; i += kTogether) {
    tables.args.OfStacked(tables.first, i).expert_load[first + Lane()] = load;
  }
}

// All of this comes in so many parts, each of which kTogether warps do.
__host__ __device__ inline std::int64_t LayOutParts(const PlanTables& tables) {
  const auto groups_of = [](std::int64_t columns) {
    return (columns + kWarpSize - 1) / kWarpSize;
  };
  const std::int64_t num_ranks = tables.args.num_ranks;
  return num_ranks + groups_of(num_ranks) + groups_of(tables.args.num_experts);
}

template <int kTogether>
__device__ void LayOutPart(const PlanTables& tables, std::int64_t part,
                           ColumnSums* sums) {
  const std::int32_t* counts = tables.Overflows() ? tables.placed : tables.asked;
  const std::int64_t num_ranks = tables.args.num_ranks;
  const std::int64_t received = (num_ranks + kWarpSize - 1) / kWarpSize;
  if (part < num_ranks) {
    LayOutGroups<kTogether>(tables, counts, part, sums);
  } else if (part < num_ranks + received) {
    LayOutReceived<kTogether>(tables, counts, (part - num_ranks) * kWarpSize, sums);
  } else {
    TellLoads<kTogether>(tables, (part - num_ranks - received) * kWarpSize, sums);
  }
}

}  // namespace jax_ep::cuda

#endif  // JAX_EP_FFI_CUDA_PLAN_LAYOUT_H_
