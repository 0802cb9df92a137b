// Encodes rows on a CPU: shares them out, for row_encoding.h to encode them.

#include "cpu/encode_rows.h"

#include <algorithm>
#include <cstdint>

#include "cpu/has_avx2.h"
#include "cpu/row_encoding.h"

namespace jax_ep::cpu {
namespace {

std::int64_t RowsPerChunk(const EncodeRowsArgs& args) {
  return ItemsPerChunk(args.hidden * ByteWidth(args.dtype));
}

void RunChunk(const void* opaque, std::int64_t chunk) {
  const auto& args = *static_cast<const EncodeRowsArgs*>(opaque);
  const std::int64_t begin = chunk * RowsPerChunk(args);
  BestEncodeLoop()(args, begin, std::min(begin + RowsPerChunk(args), args.num_rows));
}

}  // namespace

EncodeLoop* BestEncodeLoop() {
#if defined(__x86_64__)
  if (HasAvx2()) return EncodeAvx2;
#endif
  return EncodeBaseline;
}

Work EncodeRowsWork(const EncodeRowsArgs& args) {
  return {.args = &args,
          .run = RunChunk,
          .num_chunks = CeilDiv(args.num_rows, RowsPerChunk(args))};
}

}  // namespace jax_ep::cpu
