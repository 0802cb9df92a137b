// Runs a kernel's chunks in a random order, or at once on many threads.

#ifndef JAX_EP_TESTS_NATIVE_RUN_WORK_H_
#define JAX_EP_TESTS_NATIVE_RUN_WORK_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "common/work.h"
#include "fabric/work/ieee.h"
#include "threads.h"

namespace jax_ep {

inline void RunChunk(const Work& work, std::int64_t chunk) {
  const ScopedIeee ieee;
  work.run(work.args, chunk);
}

// Runs the chunks one after the other, in random order.
inline void RunShuffled(const Work& work, std::mt19937_64& rng) {
  std::vector<std::int64_t> chunks(static_cast<std::size_t>(work.num_chunks));
  std::iota(chunks.begin(), chunks.end(), 0);
  std::ranges::shuffle(chunks, rng);
  for (const std::int64_t chunk : chunks) RunChunk(work, chunk);
}

// Runs all chunks at the same time, each on a thread of its own.
inline void RunAtOnce(const Work& work) {
  OnThreads(work.num_chunks, [&](std::int64_t chunk) { RunChunk(work, chunk); });
}

}  // namespace jax_ep

#endif  // JAX_EP_TESTS_NATIVE_RUN_WORK_H_
