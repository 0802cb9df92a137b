// A process of a channel that the test plays, against one that is real.
// Used by tests of what channels wait for.

#ifndef JAX_EP_TESTS_NATIVE_PLAYED_PROCESS_H_
#define JAX_EP_TESTS_NATIVE_PLAYED_PROCESS_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "check.h"
#include "fabric/processes/futex.h"
#include "fabric/processes/process_words.h"
#include "fabric/processes/shared_print.h"
#include "fabric/processes/window.h"
#include "simulated_processes.h"

namespace jax_ep {

inline constexpr std::chrono::duration<double> kShort{0.2};
// A call that ends much sooner than this did not wait for it.
inline constexpr std::chrono::duration<double> kLong{60};
inline constexpr std::chrono::duration<double> kAtOnce{20};

// A process of one rank that the test plays: it does as much of the protocol as it is
// told to.
class PlayedProcess {
 public:
  explicit PlayedProcess(Shown& shown) : words_(shown.words), shown_(shown) {}

  void Enter(Phase phase, Epoch epoch) {
    words_.epoch.store(epoch, std::memory_order_relaxed);
    words_.phase.store(phase, std::memory_order_relaxed);
    Ring(words_.bell);
  }
  // Once: who has been told may be reading it.
  void Announce(Epoch epoch, const SpanCall& call) {
    if (words_.announced.load(std::memory_order_relaxed) == epoch) return;
    words_.names[epoch % 2] = {.site = call.site, .execution = call.run_id};
    words_.announced.store(epoch, std::memory_order_release);
    Ring(words_.bell);
  }
  void Publish(Epoch epoch, const SpanCall& call) {
    words_.prints[epoch % 2] = Share(call.print, call.bytes);
    const HalfLayout layout(call.bytes);
    char* half = shown_.NewHalf(epoch % 2, layout.BytesOf(1));
    for (std::size_t lent = 0; lent < call.bytes.size(); ++lent) {
      char* place = layout.Place(half, 0, lent);
      for (std::int64_t i = 0; i < call.bytes[lent]; ++i) {
        place[i] = PayloadByte(call, lent, i);
      }
    }
    words_.published.store(epoch, std::memory_order_release);
    Enter(Phase::kAwaiting, epoch);
  }
  void Finish(Epoch epoch) {
    words_.finished.store(epoch, std::memory_order_release);
    Enter(Phase::kIdle, epoch);
  }
  void GiveUp(Epoch epoch) {
    words_.gave_up.store(epoch, std::memory_order_release);
    Ring(words_.bell);
  }
  void Die() { shown_.alive.store(false, std::memory_order_relaxed); }

 private:
  ProcessWords& words_;
  Shown& shown_;
};

// Two processes of one rank each, of which the test plays one. Time-outs are long.
struct Duel {
  explicit Duel(std::int32_t played)
      : job(2, nullptr, played),
        group(job.AddGroup({0, 1})),
        peer(job.shown(group, played)),
        own({.rank = 1 - played}),
        theirs({.rank = played}) {
    job.SetTimeout(own.rank, kLong);
  }

  // Both carry out the exchange of one more epoch.
  void CheckExchange() {
    ++epoch;
    const PendingSpanCall pending = job.Attend(own);
    if (theirs.rank == 0) peer.Announce(epoch, theirs);
    peer.Publish(epoch, theirs);
    CheckWorked(own, 2, pending.Wait());
    peer.Finish(epoch);
    ++own.turn;
    ++theirs.turn;
  }

  // The process's calls fail now, and it says so to others.
  void CheckIsOver(const std::vector<std::string>& parts) {
    job.SetTimeout(own.rank, kLong);
    const auto start = Clock::now();
    ++own.turn;
    SpanCall other = own;
    other.site = 2;
    other.print.op = "combine";
    CheckFailed(job.Attend(own).Wait(), parts);
    std::vector<std::string> of_combine = parts;
    of_combine.emplace_back("combine: rank " + Show(own.rank) + " of 2 gave up");
    CheckFailed(job.Attend(other).Wait(), of_combine);
    EP_CHECK(Clock::now() - start < kAtOnce);
    EP_CHECK_EQ(job.shown(group, own.rank).words.gave_up.load(), epoch + 1);
  }

  SimulatedJob job;
  std::int32_t group;
  PlayedProcess peer;
  SpanCall own;
  SpanCall theirs;
  Epoch epoch = 0;  // of the last exchange
};

}  // namespace jax_ep

#endif  // JAX_EP_TESTS_NATIVE_PLAYED_PROCESS_H_
