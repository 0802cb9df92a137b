// What a process shows to all others of its job, in shared memory: its board.
// Used by hosts, by those who connect channels, and by first runs.

#ifndef JAX_EP_FFI_FABRIC_PROCESSES_BOARD_H_
#define JAX_EP_FFI_FABRIC_PROCESSES_BOARD_H_

#include <sys/types.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "fabric/processes/futex.h"
#include "fabric/processes/process_words.h"

namespace jax_ep {

// The words of each of its channels, and how far its ranks are with first runs.
struct Board {
  // Of one process: a program has a channel for each group of ranks that it exchanges
  // in, of which a mesh has a few. Untouched words cost no memory.
  static constexpr std::size_t kMaxChannels = 1024;

  // Of one process, over all its groups: for a few hundred devices in a few groups.
  static constexpr std::size_t kMaxRanks = 4096;

  // How often a rank has begun to run a call for the first time, and how often it has
  // seen all others of its group do so.
  struct FirstRunsOfRank {
    std::atomic<std::uint64_t> key;  // of group and rank; 0: nobody's
    std::atomic<std::int32_t> begun;
    std::atomic<std::int32_t> met;
  };

  Bell opened;  // rung after words got their key
  std::array<ProcessWords, kMaxChannels> words;
  std::array<FirstRunsOfRank, kMaxRanks> first_runs;
};

// Where to find a process's board.
struct BoardAddress {
  pid_t process;
  int number;
};

// Finds a key in a table of a board, which fills up from its start, or returns null.
template <typename Table>
auto* FindKey(Table& table, std::uint64_t key) {
  for (auto& entry : table) {
    const std::uint64_t found = entry.key.load(std::memory_order_acquire);
    if (found == key) return &entry;
    if (found == 0) break;
  }
  return static_cast<decltype(table.data())>(nullptr);
}

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_PROCESSES_BOARD_H_
