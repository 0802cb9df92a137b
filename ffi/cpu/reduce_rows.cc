// Adds up tokens' rows on a CPU: finds the rows, for row_math.h to add them.

#include "cpu/reduce_rows.h"

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/plan_fault.h"
#include "cpu/row_math.h"

namespace jax_ep::cpu {
namespace {

std::int64_t TokensPerChunk(const ReduceRowsArgs& args) {
  return ItemsPerChunk(args.hidden * ByteWidth(args.dtype) * args.num_topk);
}

// Lists token t's rows by ascending (rank, k); returns how many there are.
std::int64_t ListTerms(const ReduceRowsArgs& args, std::int64_t t, ReduceTerm* terms) {
  const std::int64_t row_bytes = args.hidden * ByteWidth(args.dtype);
  std::int64_t count = 0;
  for (std::int64_t k = 0; k < args.num_topk; ++k) {
    const std::int64_t choice = t * args.num_topk + k;
    if (!HasRow(args, choice)) {
      NoteMissingRow(args, choice);
      continue;
    }
    const std::int32_t row = args.send_row[choice];
    const std::int32_t rank = args.send_rank[choice];
    const ReduceTerm term = {
        .row = static_cast<const char*>(args.rows[rank]) + row * row_bytes,
        .weight = args.weights == nullptr ? 1.0F : args.weights[choice],
        .rank = rank,
        .node = rank / static_cast<std::int32_t>(args.ranks_per_node),
    };
    std::int64_t i = count++;
    for (; i > 0 && terms[i - 1].rank > term.rank; --i) terms[i] = terms[i - 1];
    terms[i] = term;
  }
  return count;
}

void RunChunk(const void* opaque, std::int64_t chunk) {
  const auto& args = *static_cast<const ReduceRowsArgs*>(opaque);
  const RowMath& math = BestRowMath();
  const std::int64_t row_bytes = args.hidden * ByteWidth(args.dtype);
  const std::int64_t begin = chunk * TokensPerChunk(args);
  const std::int64_t end = std::min(begin + TokensPerChunk(args), args.num_tokens);
  // The next token's terms are listed before this one's are added, to fetch ahead.
  std::vector<ReduceTerm> terms(static_cast<std::size_t>(args.num_topk));
  std::vector<ReduceTerm> next(static_cast<std::size_t>(args.num_topk));
  std::int64_t next_count = ListTerms(args, begin, next.data());
  for (std::int64_t t = begin; t < end; ++t) {
    std::swap(terms, next);
    const std::int64_t count = next_count;
    next_count = t + 1 < end ? ListTerms(args, t + 1, next.data()) : 0;
    void* out = static_cast<char*>(args.out) + t * row_bytes;
    math.reduce(args.dtype, terms.data(), count, out, args.hidden,
                next_count > 0 ? next[0].row : nullptr);
  }
}

}  // namespace

Work ReduceRowsWork(const ReduceRowsArgs& args) {
  return {.args = &args,
          .run = RunChunk,
          .num_chunks = CeilDiv(args.num_tokens, TokensPerChunk(args))};
}

}  // namespace jax_ep::cpu
