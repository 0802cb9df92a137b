// What one process tells the others of a channel, in shared memory.
// Written by its channel; read by those of the others.

#ifndef JAX_EP_FFI_FABRIC_PROCESSES_PROCESS_WORDS_H_
#define JAX_EP_FFI_FABRIC_PROCESSES_PROCESS_WORDS_H_

#include <array>
#include <atomic>
#include <cstdint>

#include "fabric/processes/futex.h"
#include "fabric/processes/shared_print.h"

namespace jax_ep {

// The words of docs/protocol.md: what one process tells the others of one channel. It
// alone writes them. Epochs count the channel's exchanges from 1 and only grow.

using Epoch = std::uint64_t;

// What a process is doing in its epoch, for those that have waited in vain.
enum class Phase : std::uint32_t {
  kIdle,        // between exchanges
  kConnecting,  // waiting until all have mapped each other's memory
  kFollowing,   // waiting for the leader to name the next exchange
  kMeeting,     // waiting for ranks of its own
  kReusing,     // waiting until all have finished with the half it is to fill
  kPublishing,  // copying its ranks' buffers into its window
  kAwaiting,    // waiting for the others' buffers
  kPulling,     // reading them
};

// Which exchange an epoch is, the same in all processes: a call that its ranks have
// agreed on, and which execution of it, counted from when they did.
struct ExchangeName {
  std::int64_t site;
  std::int64_t execution;
  bool operator==(const ExchangeName&) const = default;
};

constexpr std::uint64_t Digest(const ExchangeName& name) {
  const auto site = static_cast<std::uint64_t>(name.site);
  const auto execution = static_cast<std::uint64_t>(name.execution);
  return ((site << 40) + execution) * 0x9e3779b97f4a7c15ULL + 1;
}

static_assert(std::atomic<Epoch>::is_always_lock_free);

// In this order for the sake of cache lines: what is written once, what changes in each
// exchange, what is read once others say so.
// NOLINTNEXTLINE(clang-analyzer-optin.performance.Padding)
struct alignas(64) ProcessWords {
  // Written once, before `key` is released.
  std::array<std::int32_t, 2> window_files;
  std::atomic<std::uint64_t> key;  // of the channel; 0: these words are nobody's

  alignas(64) Bell bell;  // rung after every change of what follows
  std::atomic<Phase> phase;
  std::atomic<Epoch> epoch;        // that the phase is of
  std::atomic<std::int32_t> core;  // where it began
  std::atomic<Epoch> announced;    // the leader's: epochs that it has named
  std::atomic<Epoch> published;
  std::atomic<Epoch> finished;
  std::atomic<Epoch> gave_up;          // in which it failed; 0: it has not
  std::atomic<std::uint64_t> came_to;  // digest of the name its ranks last came to

  // By the epoch's last bit, released by `announced` and `published`.
  alignas(64) std::array<ExchangeName, 2> names;
  std::array<SharedPrint, 2> prints;
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_PROCESSES_PROCESS_WORDS_H_
