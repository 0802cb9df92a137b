// Multiplies rows on a CPU: finds the rows, for row_math.h to multiply them.

#include "cpu/row_dots.h"

#include <algorithm>
#include <cstdint>

#include "cpu/plan_fault.h"
#include "cpu/row_math.h"

namespace jax_ep::cpu {
namespace {

std::int64_t TokensPerChunk(const RowDotsArgs& args) {
  return ItemsPerChunk(args.hidden * ByteWidth(args.dtype) * args.num_topk);
}

void RunChunk(const void* opaque, std::int64_t chunk) {
  const auto& args = *static_cast<const RowDotsArgs*>(opaque);
  const RowMath& math = BestRowMath();
  const std::int64_t row_bytes = args.hidden * ByteWidth(args.dtype);
  const std::int64_t begin = chunk * TokensPerChunk(args);
  const std::int64_t end = std::min(begin + TokensPerChunk(args), args.num_tokens);
  for (std::int64_t t = begin; t < end; ++t) {
    const char* b = static_cast<const char*>(args.dout) + t * row_bytes;
    for (std::int64_t k = 0; k < args.num_topk; ++k) {
      const std::int64_t choice = t * args.num_topk + k;
      if (!HasRow(args, choice)) {
        NoteMissingRow(args, choice);
        args.dots[choice] = 0;
        continue;
      }
      const void* rows = args.rows[args.send_rank[choice]];
      const char* a =
          static_cast<const char*>(rows) + args.send_row[choice] * row_bytes;
      args.dots[choice] = math.dot(args.dtype, a, b, args.hidden);
    }
  }
}

}  // namespace

Work RowDotsWork(const RowDotsArgs& args) {
  return {.args = &args,
          .run = RunChunk,
          .num_chunks = CeilDiv(args.num_tokens, TokensPerChunk(args))};
}

}  // namespace jax_ep::cpu
