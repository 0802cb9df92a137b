// Implements publish_rows.h.
#include "cpu/publish_rows.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/output_pages.h"
#include "cpu/row_math.h"

namespace jax_ep::cpu {
namespace {

// Entries [begin, end) of all ranges put together.
void CopyEntries(const PublishRowsArgs& args, std::int64_t begin, std::int64_t end) {
  const RowMath& math = BestRowMath();
  const bool stream = StreamsOutput(args.NumEntries() * args.row_bytes);
  const auto* from = static_cast<const char*>(args.from);
  auto* to = static_cast<char*>(args.to);
  std::int64_t first = 0;
  for (const auto& [range_begin, range_end] : args.ranges) {
    const std::int64_t count = range_end - range_begin;
    const std::int64_t from_entry = std::max<std::int64_t>(begin - first, 0);
    const std::int64_t to_entry = std::min(end - first, count);
    for (std::int64_t i = from_entry; i < to_entry; ++i) {
      const std::int64_t entry = range_begin + i;
      const std::int64_t row = args.rows == nullptr ? entry : args.rows[entry];
      void* target = to + row * args.row_bytes;
      math.copy(from + row * args.row_bytes, &target, 1, args.row_bytes, stream);
    }
    first += count;
  }
  math.fence();
}

void RunChunk(const void* opaque, std::int64_t chunk) {
  const auto& args = *static_cast<const PublishRowsArgs*>(opaque);
  const std::int64_t step = ItemsPerChunk(args.row_bytes);
  const std::int64_t begin = chunk * step;
  CopyEntries(args, begin, std::min(begin + step, args.NumEntries()));
}

// The entries of ranks elsewhere in the receive list.
std::vector<std::pair<std::int64_t, std::int64_t>> RangesOf(
    const std::int32_t* recv_counts, const std::vector<bool>& is_elsewhere) {
  std::vector<std::pair<std::int64_t, std::int64_t>> ranges;
  std::int64_t end = 0;
  for (std::size_t rank = 0; rank < is_elsewhere.size(); ++rank) {
    const std::int64_t begin = end;
    end += recv_counts[rank];
    if (begin == end || !is_elsewhere[rank]) continue;
    if (!ranges.empty() && ranges.back().second == begin) {
      ranges.back().second = end;
    } else {
      ranges.emplace_back(begin, end);
    }
  }
  return ranges;
}

}  // namespace

void KeepPulledRows(const std::int32_t* recv_row, const std::int32_t* recv_counts,
                    const std::vector<bool>& is_elsewhere, PlanFault* fault,
                    PublishRowsArgs& args) {
  const auto num_ranks = static_cast<std::int64_t>(is_elsewhere.size());
  if (!AreCounts(recv_counts, num_ranks, args.num_rows)) {
    return NoteFault(fault, kBadRecvCounts);
  }
  auto ranges = RangesOf(recv_counts, is_elsewhere);
  for (const auto& [begin, end] : ranges) {
    const bool are_rows = std::all_of(recv_row + begin, recv_row + end, [&](auto row) {
      return IsIndex(row, args.num_rows);
    });
    if (!are_rows) return NoteFault(fault, kBadRecvRow);
  }
  args.rows = recv_row;
  args.ranges = std::move(ranges);
}

Work PublishRowsWork(const PublishRowsArgs& args) {
  return {.args = &args,
          .run = RunChunk,
          .num_chunks = CeilDiv(args.NumEntries(), ItemsPerChunk(args.row_bytes))};
}

}  // namespace jax_ep::cpu
