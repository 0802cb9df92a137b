#include "cpu/gather_rows.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/output_pages.h"
#include "cpu/row_math.h"

namespace jax_ep {
namespace {

std::int64_t RowsPerChunk(const GatherRowsArgs& args) {
  return ItemsPerChunk(args.row_bytes);
}

char* Row(const GatherRowsArgs& args, std::int64_t row) {
  return static_cast<char*>(args.rows) + row * args.row_bytes;
}

std::int64_t UsedRows(const GatherRowsArgs& args) {
  std::int64_t used = 0;
  for (std::int64_t i = 0; i < args.num_local_experts; ++i) used += args.group_sizes[i];
  return used;
}

// Where a received choice's token and weight are.
struct Source {
  std::int64_t rank;
  std::int64_t token;
};

Source SourceOf(const GatherRowsArgs& args, std::int64_t entry) {
  const std::int64_t token = args.recv_choice[entry] / args.num_topk;
  return {.rank = token / args.num_tokens, .token = token % args.num_tokens};
}

bool SameToken(const GatherRowsArgs& args, std::int64_t a, std::int64_t b) {
  return args.recv_choice[a] / args.num_topk == args.recv_choice[b] / args.num_topk;
}

const char* TokenRow(const GatherRowsArgs& args, Source source) {
  return static_cast<const char*>(args.x[source.rank]) + source.token * args.row_bytes;
}

// Entries [begin, end) of the receive list, from the first whose token does not already
// start before them to the last of the last token: each token is read by one chunk.
void CopyTokens(const GatherRowsArgs& args, std::int64_t begin, std::int64_t end) {
  const RowMath& math = BestRowMath();
  const bool stream = StreamsOutput(args.capacity * args.row_bytes);
  const std::int64_t num_received = args.NumReceived();
  std::vector<void*> targets;
  std::int64_t i = begin;
  while (i < end && i > 0 && SameToken(args, i, i - 1)) ++i;
  while (i < end) {
    const char* token = TokenRow(args, SourceOf(args, i));
    targets.clear();
    const std::int64_t first = i;
    do {
      targets.push_back(Row(args, args.recv_row[i++]));
    } while (i < num_received && SameToken(args, i, first));
    if (i < end) math.prefetch(TokenRow(args, SourceOf(args, i)), args.row_bytes);
    math.copy(token, targets.data(), static_cast<std::int64_t>(targets.size()),
              args.row_bytes, stream);
  }
  math.fence();
}

void ScaleTokens(const GatherRowsArgs& args, std::int64_t begin, std::int64_t end) {
  const RowMath& math = BestRowMath();
  for (std::int64_t i = begin; i < end; ++i) {
    const Source source = SourceOf(args, i);
    const auto* weights = static_cast<const float*>(args.weights[source.rank]);
    const std::int64_t k = args.recv_choice[i] % args.num_topk;
    math.scale(args.dtype, TokenRow(args, source),
               weights[source.token * args.num_topk + k], Row(args, args.recv_row[i]),
               args.hidden);
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

// Chunks are, in this order: entries of the receive list; the padding inside groups;
// and, where it is to be zero, the tail.
void RunChunk(const void* opaque, std::int64_t chunk) {
  const auto& args = *static_cast<const GatherRowsArgs*>(opaque);
  const std::int64_t step = RowsPerChunk(args);
  const std::int64_t num_received = args.NumReceived();
  const std::int64_t entry_chunks = CeilDiv(num_received, step);
  if (chunk < entry_chunks) {
    const std::int64_t begin = chunk * step;
    const std::int64_t end = std::min(begin + step, num_received);
    (args.scaled ? ScaleTokens : CopyTokens)(args, begin, end);
  } else if (chunk == entry_chunks) {
    ZeroPadding(args);
  } else {
    const std::int64_t begin = UsedRows(args) + (chunk - entry_chunks - 1) * step;
    const std::int64_t end = std::min(begin + step, args.capacity);
    std::memset(Row(args, begin), 0,
                static_cast<std::size_t>((end - begin) * args.row_bytes));
  }
}

}  // namespace

Work GatherRowsWork(const GatherRowsArgs& args) {
  PrepareOutputPages(args.rows, args.capacity * args.row_bytes);
  const std::int64_t step = RowsPerChunk(args);
  const std::int64_t tail = args.zero_tail ? args.capacity - UsedRows(args) : 0;
  return {.args = &args,
          .run = RunChunk,
          .num_chunks = CeilDiv(args.NumReceived(), step) + 1 + CeilDiv(tail, step)};
}

}  // namespace jax_ep
