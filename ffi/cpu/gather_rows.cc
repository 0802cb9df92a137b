// Pulls tokens into rows on a CPU, copied or scaled, and zeroes what no token fills.

#include "cpu/gather_rows.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/output_pages.h"
#include "cpu/plan_fault.h"
#include "cpu/row_math.h"

namespace jax_ep::cpu {
namespace {

std::int64_t RowsPerChunk(const GatherRowsArgs& args) {
  return ItemsPerChunk(args.row_bytes);
}

char* Row(const GatherRowsArgs& args, std::int64_t row) {
  void* rows = args.rows;
  if (rows == nullptr) {
    rows = args.pieces[row / args.piece_rows];
    row %= args.piece_rows;
  }
  return static_cast<char*>(rows) + row * args.row_bytes;
}

void PreparePages(const GatherRowsArgs& args) {
  if (args.rows != nullptr) {
    return PrepareOutputPages(args.rows, args.capacity * args.row_bytes);
  }
  for (std::int64_t row = 0; row < args.capacity; row += args.piece_rows) {
    PrepareOutputPages(Row(args, row), args.piece_rows * args.row_bytes);
  }
}

std::int64_t UsedRows(const GatherRowsArgs& args) {
  std::int64_t used = 0;
  for (std::int64_t i = 0; i < args.num_local_experts; ++i) used += args.group_sizes[i];
  return used;
}

// Returns what is wrong with the numbers on which the cut into chunks rests, or null.
const char* FindFault(const GatherRowsArgs& args) {
  if (!args.FillsWithOwn() &&
      !AreCounts(args.recv_counts, args.num_ranks, args.capacity)) {
    return kBadRecvCounts;
  }
  if (!AreCounts(args.group_sizes, args.num_local_experts, args.capacity)) {
    return "group_sizes holds a negative number, or adds up to more than capacity";
  }
  for (std::int64_t i = 0; i < args.num_local_experts; ++i) {
    if (args.group_rows[i] < 0 || args.group_rows[i] > args.group_sizes[i]) {
      return "group_rows holds a number outside [0, group_sizes]";
    }
  }
  return nullptr;
}

constexpr char kBadRecvChoice[] =
    "recv_choice holds a choice outside [0, num_ranks * num_tokens * num_topk)";

const char* TokenRow(const GatherRowsArgs& args, std::int32_t token) {
  const void* x = args.x[token / args.num_tokens];
  return static_cast<const char*>(x) + token % args.num_tokens * args.row_bytes;
}

void AppendRow(const GatherRowsArgs& args, std::int64_t entry,
               std::vector<void*>& rows) {
  const std::int32_t row = args.recv_row[entry];
  if (!IsIndex(row, args.capacity)) return NoteFault(args.fault, kBadRecvRow);
  rows.push_back(Row(args, row));
}

// Entries [begin, end) of the receive list, from the first whose token does not already
// start before them to the last of the last token: each token is read by one chunk.
void CopyTokens(const GatherRowsArgs& args, std::int64_t begin, std::int64_t end) {
  const RowMath& math = BestRowMath();
  const bool stream = StreamsOutput(args.capacity * args.row_bytes);
  const std::int64_t num_received = args.NumReceived();
  std::vector<void*> targets;
  std::int64_t i = begin;
  std::int32_t next = args.TokenOf(begin);
  if (begin > 0 && args.TokenOf(begin - 1) == next) {
    while (i < end && args.TokenOf(i) == next) ++i;
    if (i < end) next = args.TokenOf(i);
  }
  while (i < end) {
    const std::int32_t token = next;
    targets.clear();
    do {
      AppendRow(args, i++, targets);
      next = i < num_received ? args.TokenOf(i) : kNoToken;
    } while (i < num_received && next == token);
    if (i < end && next != kNoToken) {
      math.prefetch(TokenRow(args, next), args.row_bytes);
    }
    if (token == kNoToken) {
      NoteFault(args.fault, kBadRecvChoice);
      continue;
    }
    math.copy(TokenRow(args, token), targets.data(),
              static_cast<std::int64_t>(targets.size()), args.row_bytes, stream);
  }
  math.fence();
}

void ScaleTokens(const GatherRowsArgs& args, std::int64_t begin, std::int64_t end) {
  const RowMath& math = BestRowMath();
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int32_t token = args.TokenOf(i);
    const std::int32_t row = args.recv_row[i];
    if (token == kNoToken || !IsIndex(row, args.capacity)) {
      NoteFault(args.fault, token == kNoToken ? kBadRecvChoice : kBadRecvRow);
      continue;
    }
    const std::int64_t rank = token / args.num_tokens;
    const auto* weights = static_cast<const float*>(args.weights[rank]);
    const std::int64_t own =
        args.recv_choice[i] - rank * args.num_tokens * args.num_topk;
    math.scale(args.dtype, TokenRow(args, token), weights[own], Row(args, row),
               args.hidden);
  }
}

// Tokens [begin, end) of this rank, each to the rows of its choices.
void CopyOwn(const GatherRowsArgs& args, std::int64_t begin, std::int64_t end) {
  const RowMath& math = BestRowMath();
  const bool stream = StreamsOutput(args.capacity * args.row_bytes);
  std::vector<void*> targets;
  for (std::int64_t t = begin; t < end; ++t) {
    targets.clear();
    for (std::int64_t i = t * args.num_topk; i < (t + 1) * args.num_topk; ++i) {
      if (HasRow(args, i)) {
        targets.push_back(Row(args, args.send_row[i]));
      } else {
        NoteMissingRow(args, i);
      }
    }
    math.copy(TokenRow(args, static_cast<std::int32_t>(t)), targets.data(),
              static_cast<std::int64_t>(targets.size()), args.row_bytes, stream);
  }
  math.fence();
}

void ScaleOwn(const GatherRowsArgs& args, std::int64_t begin, std::int64_t end) {
  const RowMath& math = BestRowMath();
  const auto* weights = static_cast<const float*>(args.weights[0]);
  for (std::int64_t i = begin * args.num_topk; i < end * args.num_topk; ++i) {
    if (!HasRow(args, i)) {
      NoteMissingRow(args, i);
      continue;
    }
    math.scale(args.dtype, TokenRow(args, static_cast<std::int32_t>(i / args.num_topk)),
               weights[i], Row(args, args.send_row[i]), args.hidden);
  }
}

// What fills rows is cut into these.
struct Sources {
  std::int64_t count;  // tokens of this rank, or entries of the receive list
  std::int64_t step;   // of them in a chunk

  std::int64_t chunks() const { return CeilDiv(count, step); }
};

Sources SourcesOf(const GatherRowsArgs& args) {
  if (!args.FillsWithOwn()) {
    return {.count = args.NumReceived(), .step = RowsPerChunk(args)};
  }
  return {.count = args.num_tokens,
          .step = ItemsPerChunk(args.row_bytes * args.num_topk)};
}

void FillRows(const GatherRowsArgs& args, std::int64_t begin, std::int64_t end) {
  if (args.FillsWithOwn()) {
    (args.scaled ? ScaleOwn : CopyOwn)(args, begin, end);
  } else {
    (args.scaled ? ScaleTokens : CopyTokens)(args, begin, end);
  }
}

void ZeroPadding(const GatherRowsArgs& args) {
  std::int64_t start = 0;
  for (std::int64_t i = 0; i < args.num_local_experts; ++i) {
    const std::int64_t padding = args.group_sizes[i] - args.group_rows[i];
    std::memset(Row(args, start + args.group_rows[i]), 0,
                static_cast<std::size_t>(padding * args.row_bytes));
    start += args.group_sizes[i];
  }
}

// Chunks are, in this order: what fills rows; the padding inside groups; and, where it
// is to be zero, the tail.
void RunChunk(const void* opaque, std::int64_t chunk) {
  const auto& args = *static_cast<const GatherRowsArgs*>(opaque);
  const Sources sources = SourcesOf(args);
  if (chunk < sources.chunks()) {
    const std::int64_t begin = chunk * sources.step;
    FillRows(args, begin, std::min(begin + sources.step, sources.count));
  } else if (chunk == sources.chunks()) {
    ZeroPadding(args);
  } else {
    const std::int64_t step = RowsPerChunk(args);
    const std::int64_t begin = UsedRows(args) + (chunk - sources.chunks() - 1) * step;
    const std::int64_t end = std::min(begin + step, args.capacity);
    std::memset(Row(args, begin), 0,
                static_cast<std::size_t>((end - begin) * args.row_bytes));
  }
}

}  // namespace

Work GatherRowsWork(const GatherRowsArgs& args) {
  if (const char* what = FindFault(args)) {
    NoteFault(args.fault, what);
    return {};
  }
  PreparePages(args);
  const std::int64_t tail = args.zero_tail ? args.capacity - UsedRows(args) : 0;
  return {
      .args = &args,
      .run = RunChunk,
      .num_chunks = SourcesOf(args).chunks() + 1 + CeilDiv(tail, RowsPerChunk(args))};
}

}  // namespace jax_ep::cpu
