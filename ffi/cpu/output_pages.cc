// The sizes from which an output is worth the trouble, and what Linux is told of it;
// other systems have nothing to be told.

#include "cpu/output_pages.h"

#include <sys/mman.h>

#include <cstdint>

namespace jax_ep::cpu {
namespace {

constexpr std::int64_t kStreamFromBytes = 4 * 1024 * 1024;

}  // namespace

#if defined(MADV_HUGEPAGE)

void PrepareOutputPages(void* data, std::int64_t bytes) {
  constexpr std::uintptr_t kHugePageBytes = 2 * 1024 * 1024;
  constexpr std::int64_t kPrepareFromBytes = 16 * 1024 * 1024;
  if (bytes < kPrepareFromBytes) return;
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t begin = (address + kHugePageBytes - 1) & -kHugePageBytes;
  const std::uintptr_t end =
      (address + static_cast<std::uintptr_t>(bytes)) & -kHugePageBytes;
  if (begin >= end) return;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

#else

void PrepareOutputPages(void*, std::int64_t) {}

#endif

bool StreamsOutput(std::int64_t bytes) { return bytes >= kStreamFromBytes; }

}  // namespace jax_ep::cpu
