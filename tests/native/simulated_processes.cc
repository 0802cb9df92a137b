// Implements simulated_processes.h.
#include "simulated_processes.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "fabric/processes/channel.h"
#include "fabric/threads/meeting.h"

namespace jax_ep {
namespace {

constexpr char kPoison = 'P';

std::uint64_t Seed(const SpanCall& call, std::size_t buffer) {
  std::uint64_t seed = 1;
  for (const std::int64_t part :
       {call.run_id, call.site, std::int64_t{call.group}, std::int64_t{call.rank},
        call.turn, static_cast<std::int64_t>(buffer)}) {
    seed = (seed + static_cast<std::uint64_t>(part)) * 0x9e3779b97f4a7c15ULL;
    seed ^= seed >> 31;
  }
  return seed;
}

char Byte(std::uint64_t seed, std::int64_t i) {
  return static_cast<char>(
      (seed + static_cast<std::uint64_t>(i) * 0xd1342543de82ef95ULL) >> 56);
}

std::vector<char> Payload(const SpanCall& call, std::size_t buffer, std::int64_t begin,
                          std::int64_t end) {
  const std::uint64_t seed = Seed(call, buffer);
  std::vector<char> payload(static_cast<std::size_t>(end - begin));
  for (std::size_t i = 0; i < payload.size(); ++i) {
    payload[i] = Byte(seed, begin + static_cast<std::int64_t>(i));
  }
  return payload;
}

// The buffers of one call, which are gone when it has ended.
struct Buffers {
  Buffers(const SpanCall& own_call, std::size_t ranks)
      : call(own_call), num_ranks(ranks), lent(call.bytes.size()) {
    for (std::size_t i = 0; i < lent.size(); ++i) {
      const std::vector<char> payload = Payload(call, i, 0, call.bytes[i]);
      lent[i] = std::make_unique<char[]>(payload.size());
      std::ranges::copy(payload, lent[i].get());
    }
  }

  // The part of a buffer that a chunk takes.
  std::array<std::int64_t, 2> Part(std::size_t buffer, std::int64_t chunk) const {
    return {call.bytes[buffer] * chunk / call.num_chunks,
            call.bytes[buffer] * (chunk + 1) / call.num_chunks};
  }

  std::vector<Lent> Lend() const {
    std::vector<Lent> all;
    for (std::size_t i = 0; i < lent.size(); ++i) {
      all.push_back({.data = lent[i].get(), .shared_bytes = call.bytes[i]});
    }
    return all;
  }

  SpanCall call;
  std::size_t num_ranks;
  std::vector<std::unique_ptr<char[]>> lent;
  std::vector<void*> places;
  PeerTables peers;
  std::atomic<std::int64_t> num_right{0};
  std::atomic<std::int64_t> num_wrong{0};
};

void CopyOut(const void* args, std::int64_t chunk) {
  const auto& buffers = *static_cast<const Buffers*>(args);
  for (std::size_t i = 0; i < buffers.lent.size(); ++i) {
    const auto [begin, end] = buffers.Part(i, chunk);
    if (begin == end) continue;
    std::memcpy(static_cast<char*>(buffers.places[i]) + begin,
                buffers.lent[i].get() + begin, static_cast<std::size_t>(end - begin));
  }
}

void LookAtAll(const void* args, std::int64_t chunk) {
  auto& buffers = *static_cast<Buffers*>(const_cast<void*>(args));
  for (std::size_t rank = 0; rank < buffers.num_ranks; ++rank) {
    SpanCall call = buffers.call;
    call.rank = static_cast<std::int32_t>(rank);
    for (std::size_t i = 0; i < buffers.lent.size(); ++i) {
      const auto [begin, end] = buffers.Part(i, chunk);
      if (begin == end) continue;
      const std::vector<char> want = Payload(call, i, begin, end);
      const char* got = static_cast<const char*>(buffers.peers[i][rank]) + begin;
      const bool right = std::memcmp(got, want.data(), want.size()) == 0;
      (right ? buffers.num_right : buffers.num_wrong)
          .fetch_add(end - begin, std::memory_order_relaxed);
    }
  }
}

class SimulatedShowcase : public Showcase {
 public:
  explicit SimulatedShowcase(Shown& shown) : shown_(shown) {}
  ProcessWords& words() override { return shown_.words; }
  char* Half(std::size_t half, std::size_t bytes, std::string& problem) override {
    if (shown_.makes_halves) return shown_.NewHalf(half, bytes);
    problem = "ftruncate: No space left on device";
    return nullptr;
  }

 private:
  Shown& shown_;
};

class SimulatedNeighbor : public Neighbor {
 public:
  SimulatedNeighbor(Shown& shown, std::int32_t process)
      : shown_(shown), process_(process) {}
  const ProcessWords& words() const override { return shown_.words; }
  const char* Half(std::size_t half, std::size_t bytes, std::string& problem) override {
    if (!shown_.shows_halves) {
      problem = "mmap: Cannot allocate memory";
      return nullptr;
    }
    EP_CHECK_EQ(shown_.half_bytes[half], bytes);
    return shown_.halves[half].get();
  }
  // Relaxed: a system call orders nothing between the processes.
  bool alive() const override { return shown_.alive.load(std::memory_order_relaxed); }
  std::int32_t process() const override { return process_; }

 private:
  Shown& shown_;
  const std::int32_t process_;
};

}  // namespace

char PayloadByte(const SpanCall& call, std::size_t buffer, std::int64_t i) {
  return Byte(Seed(call, buffer), i);
}

struct PendingSpanCall::State {
  std::atomic<bool> ended = false;
  SpanOutcome outcome;
};

PendingSpanCall::PendingSpanCall(MeetingPoint& point, std::shared_ptr<const Span> span,
                                 const SpanCall& call, const Schedule& schedule)
    : state_(std::make_shared<State>()) {
  const std::size_t num_ranks = span->process_of.size();
  const std::int32_t here = span->here;
  const auto owner = std::make_shared<std::unique_ptr<Buffers>>(
      std::make_unique<Buffers>(call, num_ranks));
  Buffers* buffers = owner->get();
  point.Attend(
      {// A process has its own number for the call.
       .key = {.run_id = call.run_id + span->first_run,
               .call_site = call.site + std::int64_t{100} * here,
               .group = call.group},
       .print = call.print,
       .rank = call.rank,
       .num_ranks = static_cast<std::int32_t>(num_ranks),
       .lent = buffers->Lend(),
       .make_work =
           [buffers](const PeerTables& tables) {
             buffers->peers = tables;
             return std::vector<Work>{{.args = buffers,
                                       .run = LookAtAll,
                                       .num_chunks = buffers->call.num_chunks}};
           },
       .done =
           [owner, state = state_](const auto& failure) {
             if (!EP_CHECK(*owner != nullptr)) return;  // told twice
             state->outcome = {.failure = failure,
                               .num_right = (*owner)->num_right,
                               .num_wrong = (*owner)->num_wrong};
             owner->reset();
             state->ended = true;
             state->ended.notify_all();
           },
       .schedule = schedule,
       .span = std::move(span),
       .make_publication =
           [buffers](const std::vector<void*>& places) {
             EP_CHECK_EQ(places.size(), buffers->lent.size());
             for (std::size_t i = 0; i < places.size(); ++i) {
               EP_CHECK_EQ(places[i] != nullptr, buffers->call.bytes[i] > 0);
             }
             buffers->places = places;
             return std::vector<Work>{{.args = buffers,
                                       .run = CopyOut,
                                       .num_chunks = buffers->call.num_chunks}};
           }});
}

bool PendingSpanCall::HasEnded() const { return state_->ended; }

const SpanOutcome& PendingSpanCall::Wait() const {
  state_->ended.wait(false);
  return state_->outcome;
}

bool CheckWorked(const SpanCall& call, std::size_t num_ranks,
                 const SpanOutcome& outcome) {
  const Case which("run " + Show(call.run_id) + " site " + Show(call.site) + " group " +
                   Show(call.group) + " turn " + Show(call.turn) + " rank " +
                   Show(call.rank) + " of " + Show(num_ranks));
  const std::int64_t all =
      static_cast<std::int64_t>(num_ranks) *
      std::accumulate(call.bytes.begin(), call.bytes.end(), std::int64_t{0});
  const bool worked = EP_CHECK_EQ(outcome.failure.value_or(""), "");
  const bool all_right = EP_CHECK_EQ(outcome.num_right, all);
  return EP_CHECK_EQ(outcome.num_wrong, 0) && worked && all_right;
}

bool CheckFailed(const SpanOutcome& outcome, const std::vector<std::string>& parts) {
  const std::string failure = outcome.failure.value_or("no failure");
  bool as_expected = EP_CHECK_EQ(outcome.num_right + outcome.num_wrong, 0);
  for (const std::string& part : parts) {
    const Case which("looking for \"" + part + "\" in \"" + failure + "\"");
    as_expected &= EP_CHECK(failure.find(part) != std::string::npos);
  }
  return as_expected;
}

char* Shown::NewHalf(std::size_t half, std::size_t bytes) {
  halves[half] = std::make_unique<char[]>(bytes);
  half_bytes[half] = bytes;
  std::memset(halves[half].get(), kPoison, bytes);
  return halves[half].get();
}

std::unique_ptr<Showcase> ShowcaseOf(Shown& shown) {
  return std::make_unique<SimulatedShowcase>(shown);
}

SimulatedJob::SimulatedJob(std::int32_t num_processes, OnPhase on_phase,
                           std::int32_t played)
    : on_phase_(std::move(on_phase)), played_(played) {
  for (std::int32_t i = 0; i < num_processes; ++i) {
    processes_.push_back(std::make_unique<Process>());
  }
}

std::int32_t SimulatedJob::AddGroup(const std::vector<std::int32_t>& process_of) {
  auto& group = *groups_.emplace_back(std::make_unique<Group>());
  group.process_of = process_of;
  for (std::size_t i = 0; i < processes_.size(); ++i) {
    group.shown.push_back(std::make_unique<Shown>());
  }
  for (std::int32_t here = 0; here < static_cast<std::int32_t>(processes_.size());
       ++here) {
    Process& own = process(here);
    auto& channel = own.channels.emplace_back();
    if (here == played_ || std::ranges::count(process_of, here) == 0) continue;
    channel = std::make_unique<Channel>(
        process_of, here,
        Channel::Options{
            .open =
                [&group, here] {
                  return ShowcaseOf(*group.shown[static_cast<std::size_t>(here)]);
                },
            .connect = [&group, here](auto,
                                      const auto&) { return NeighborsOf(group, here); },
            .schedule = own.helpers.schedule(),
            .timeout = [&own] { return std::chrono::duration<double>(own.timeout); },
            .max_threads = 2,
            .on_phase =
                [this, here](Phase phase, Epoch epoch) {
                  if (on_phase_) on_phase_(here, phase, epoch);
                }});
  }
  return static_cast<std::int32_t>(groups_.size()) - 1;
}

Neighbors SimulatedJob::NeighborsOf(const Group& group, std::int32_t here) {
  Neighbors neighbors;
  const std::set<std::int32_t> members(group.process_of.begin(),
                                       group.process_of.end());
  for (const std::int32_t member : members) {
    if (member == here) continue;
    neighbors.push_back(std::make_unique<SimulatedNeighbor>(
        *group.shown[static_cast<std::size_t>(member)], member));
  }
  return neighbors;
}

PendingSpanCall SimulatedJob::Attend(const SpanCall& call) {
  const auto group = static_cast<std::size_t>(call.group);
  const std::vector<std::int32_t>& process_of = groups_[group]->process_of;
  const std::int32_t here = process_of[static_cast<std::size_t>(call.rank)];
  Process& own = process(here);
  // The job owns the channel; a span that did would end it on a thread of its own.
  const std::shared_ptr<Relay> relay(std::shared_ptr<void>(),
                                     own.channels[group].get());
  return {own.point,
          std::make_shared<Span>(Span{
              .process_of = process_of,
              .here = here,
              .site = call.site,
              .first_run = 1000 * here,  // each counts runs from a number of its own
              .relay = relay}),
          call, own.helpers.schedule()};
}

bool SimulatedJob::Works(const SpanCall& call) {
  return CheckWorked(call, num_ranks(call.group), Attend(call).Wait());
}

std::size_t SimulatedJob::num_ranks(std::int32_t group) const {
  return groups_[static_cast<std::size_t>(group)]->process_of.size();
}

Shown& SimulatedJob::shown(std::int32_t group, std::int32_t process) {
  return *groups_[static_cast<std::size_t>(group)]
              ->shown[static_cast<std::size_t>(process)];
}

MeetingPoint& SimulatedJob::point(std::int32_t index) { return process(index).point; }

void SimulatedJob::SetTimeout(std::int32_t index,
                              std::chrono::duration<double> timeout) {
  process(index).timeout = timeout.count();
  process(index).point.SetTimeout(timeout);
}

void SimulatedJob::End(std::int32_t index) { process(index).channels.clear(); }

SimulatedJob::Process& SimulatedJob::process(std::int32_t index) const {
  return *processes_[static_cast<std::size_t>(index)];
}

}  // namespace jax_ep
