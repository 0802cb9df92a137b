// Implements meeting_calls.h.
#include "meeting_calls.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"

namespace jax_ep {
namespace {

constexpr std::uint64_t kPoison = 0xdeaddeaddeaddeadULL;

// What a rank lends says whose it is, of which call and of which turn.
std::uint64_t Payload(const Call& call, std::int32_t rank) {
  std::uint64_t payload = 1;
  for (const std::int64_t part :
       {call.key.run_id, call.key.call_site, std::int64_t{call.key.group}, call.turn,
        std::int64_t{rank}}) {
    payload = (payload + static_cast<std::uint64_t>(part)) * 0x9e3779b97f4a7c15ULL;
    payload ^= payload >> 31;
  }
  return payload;
}

// The numbers that a rank lends.
std::vector<std::uint64_t> NumbersOf(const Call& call, std::int32_t rank) {
  std::vector<std::uint64_t> numbers;
  for (std::int64_t i = 0; i < call.num_lent; ++i) {
    numbers.push_back(Payload(call, rank) ^ (static_cast<std::uint64_t>(i) << 56));
  }
  return numbers;
}

// What one of a rank's numbers adds to a sum.
std::uint64_t Summand(std::uint64_t number, std::size_t i, std::int32_t rank) {
  return number * (static_cast<std::uint64_t>(rank) * 2 + i + 1);
}

// The buffers of one call, which are gone when it has ended.
struct Buffers {
  explicit Buffers(const Call& call)
      : numbers(NumbersOf(call, call.rank)),
        num_ranks(call.num_ranks),
        sums(static_cast<std::size_t>(call.num_chunks)) {}
  ~Buffers() { std::ranges::fill(numbers, kPoison); }
  Buffers(const Buffers&) = delete;
  Buffers& operator=(const Buffers&) = delete;

  std::vector<Lent> Lend() const {
    std::vector<Lent> lent;
    for (const std::uint64_t& number : numbers) lent.push_back({.data = &number});
    return lent;
  }

  // The first half of the chunks, then the rest.
  std::vector<Work> Works() const;

  std::vector<std::uint64_t> numbers;
  PeerTables peers;
  std::int32_t num_ranks;
  std::vector<std::uint64_t> sums;
};

void AddUp(const void* args, std::int64_t chunk) {
  auto& buffers = *static_cast<Buffers*>(const_cast<void*>(args));
  std::uint64_t& sum = buffers.sums[static_cast<std::size_t>(chunk)];
  for (std::int32_t rank = 0; rank < buffers.num_ranks; ++rank) {
    for (std::size_t i = 0; i < buffers.peers.size(); ++i) {
      sum +=
          Summand(*static_cast<const std::uint64_t*>(buffers.peers[i][rank]), i, rank);
    }
    // Lets others overtake, so that what ends too early is caught.
    if (chunk % 8 == 1) std::this_thread::yield();
  }
}

void AddUpFromTheMiddle(const void* args, std::int64_t chunk) {
  const auto& buffers = *static_cast<const Buffers*>(args);
  AddUp(args, static_cast<std::int64_t>(buffers.sums.size() / 2) + chunk);
}

std::vector<Work> Buffers::Works() const {
  const auto all = static_cast<std::int64_t>(sums.size());
  return {{.args = this, .run = AddUp, .num_chunks = all / 2},
          {.args = this, .run = AddUpFromTheMiddle, .num_chunks = all - all / 2}};
}

}  // namespace

void Attend(MeetingPoint& point, const Call& call, const Schedule& schedule,
            Next next) {
  // Freed by the end of the call, not by the last user.
  const auto owner =
      std::make_shared<std::unique_ptr<Buffers>>(std::make_unique<Buffers>(call));
  Buffers* buffers = owner->get();
  const auto ended = std::make_shared<std::atomic<bool>>(false);
  point.Attend({.key = call.key,
                .print = call.print,
                .rank = call.rank,
                .num_ranks = call.num_ranks,
                .lent = buffers->Lend(),
                .make_work =
                    [buffers](const PeerTables& tables) {
                      buffers->peers = tables;
                      return buffers->Works();
                    },
                .done =
                    [owner, ended, next = std::move(next)](const auto& failure) {
                      if (!EP_CHECK(!ended->exchange(true))) return;
                      Outcome outcome = {.failure = failure,
                                         .sums = std::move((*owner)->sums)};
                      owner->reset();
                      next(outcome);
                    },
                .schedule = schedule});
}

struct PendingCall::State {
  std::atomic<bool> ended = false;
  Outcome outcome;
};

PendingCall::PendingCall(MeetingPoint& point, const Call& call,
                         const Schedule& schedule)
    : state_(std::make_shared<State>()) {
  Attend(point, call, schedule, [state = state_](const Outcome& outcome) {
    state->outcome = outcome;
    state->ended = true;
    state->ended.notify_all();
  });
}

bool PendingCall::HasEnded() const { return state_->ended; }

const Outcome& PendingCall::Wait() const {
  state_->ended.wait(false);
  return state_->outcome;
}

void AtOnce(const std::function<void()>& task) { task(); }

void CheckWorked(const Call& call, const Outcome& outcome) {
  const Case which("run " + Show(call.key.run_id) + " site " +
                   Show(call.key.call_site) + " group " + Show(call.key.group) +
                   " turn " + Show(call.turn) + " rank " + Show(call.rank) + " of " +
                   Show(call.num_ranks));
  std::uint64_t want = 0;
  for (std::int32_t rank = 0; rank < call.num_ranks; ++rank) {
    const std::vector<std::uint64_t> numbers = NumbersOf(call, rank);
    for (std::size_t i = 0; i < numbers.size(); ++i) {
      want += Summand(numbers[i], i, rank);
    }
  }
  EP_CHECK_EQ(outcome.failure.value_or(""), "");
  EP_CHECK_EQ(outcome.sums, std::vector<std::uint64_t>(
                                static_cast<std::size_t>(call.num_chunks), want));
}

void CheckFailed(const Outcome& outcome, const std::vector<std::string>& parts) {
  const std::string failure = outcome.failure.value_or("no failure");
  for (const std::string& part : parts) {
    const Case which("looking for \"" + part + "\" in \"" + failure + "\"");
    EP_CHECK(failure.find(part) != std::string::npos);
  }
  EP_CHECK_EQ(outcome.sums, std::vector<std::uint64_t>(outcome.sums.size()));
}

}  // namespace jax_ep
