// Implements describe_words.h.

#include "fabric/processes/describe_words.h"

#include <atomic>
#include <string>

#include "fabric/processes/process_words.h"

namespace jax_ep {

const char* Doing(Phase phase) {
  switch (phase) {
    case Phase::kIdle:
      return "between exchanges";
    case Phase::kConnecting:
      return "connecting";
    case Phase::kFollowing:
      return "waiting to be told what comes next";
    case Phase::kMeeting:
      return "waiting for its own ranks";
    case Phase::kReusing:
      return "waiting for its window to be read";
    case Phase::kPublishing:
      return "publishing";
    case Phase::kAwaiting:
      return "waiting for the others to publish";
    case Phase::kPulling:
      return "pulling";
  }
  return "in no known phase";
}

std::string LastSeen(const ProcessWords& words) {
  return std::string(Doing(words.phase.load(std::memory_order_relaxed))) +
         ", in epoch " + std::to_string(words.epoch.load(std::memory_order_relaxed));
}

}  // namespace jax_ep
