// Implements channel_errors.h.

#include "fabric/processes/channel_errors.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "fabric/processes/describe_words.h"
#include "fabric/threads/describe.h"

namespace jax_ep {
namespace {

// "ranks 1, 2 of process 1"
std::string Ranks(const Standing& at, std::int32_t process) {
  std::vector<std::int32_t> ranks;
  for (std::size_t rank = 0; rank < at.process_of.size(); ++rank) {
    if (at.process_of[rank] == process)
      ranks.push_back(static_cast<std::int32_t>(rank));
  }
  return RankList(ranks) + " of process " + std::to_string(process);
}

// "rank 1 of process 1 had given up, in epoch 5, pulling; …": and the others, as it may
// have waited for any of them.
std::string HadGivenUp(const Standing& at, const Neighbors& neighbors,
                       const Neighbor& neighbor) {
  const ProcessWords& words = neighbor.words();
  std::string text = Ranks(at, neighbor.process()) + " had given up, in epoch " +
                     std::to_string(words.gave_up.load(std::memory_order_acquire)) +
                     ", " + Doing(words.phase.load(std::memory_order_relaxed));
  for (const auto& other : neighbors) {
    if (other->has_given_up()) continue;
    text += "; " + Ranks(at, other->process()) + " was last seen " +
            LastSeen(other->words());
  }
  return text;
}

}  // namespace

std::string Trouble(const Standing& at, const std::string& problem) {
  return "in epoch " + std::to_string(at.epoch) + " process " +
         std::to_string(at.here) + " was " + Doing(at.phase) + " and " + problem;
}

std::string NeighborTrouble(const Standing& at, const Neighbors& neighbors,
                            const Neighbor& neighbor, const char* what) {
  if (neighbor.has_given_up()) {
    return Trouble(at, HadGivenUp(at, neighbors, neighbor));
  }
  const std::string they = Ranks(at, neighbor.process());
  const std::string last_seen = LastSeen(neighbor.words());
  if (!neighbor.alive()) return Trouble(at, they + " had ended, " + last_seen);
  return Trouble(at, they + " had not " + what + " after " + Seconds(at.timeout) +
                         "; that process was last seen " + last_seen);
}

std::string OtherCallTrouble(const Standing& at, const ExchangeName& named,
                             const CallPrint& instead) {
  return Trouble(at, "process " + std::to_string(at.process_of[0]) +
                         ", which leads, had named execution " +
                         std::to_string(named.execution) + " of call " +
                         std::to_string(named.site) + ", but " + Seconds(at.timeout) +
                         " later " + Ranks(at, at.here) + " had come to " +
                         Describe(instead) + " instead");
}

std::string MismatchTrouble(const Standing& at, const SharedPrint& own,
                            std::int32_t process, const SharedPrint& theirs) {
  return "in epoch " + std::to_string(at.epoch) + " " +
         DescribeMismatch(CallerOf(Ranks(at, at.here), own),
                          CallerOf(Ranks(at, process), theirs));
}

std::string OwnWindowTrouble(const Standing& at, std::size_t bytes,
                             const std::string& problem) {
  return Trouble(at, "could not make its window hold " + std::to_string(bytes) +
                         " bytes: " + problem);
}

std::string WindowTrouble(const Standing& at, std::int32_t process,
                          const std::string& problem) {
  return Trouble(at,
                 "could not map the window of " + Ranks(at, process) + ": " + problem);
}

}  // namespace jax_ep
