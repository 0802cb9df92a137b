// Implements channel.h: the protocol, step by step.

#include "fabric/processes/channel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "fabric/processes/channel_errors.h"
#include "fabric/processes/futex.h"
#include "fabric/processes/shared_print.h"
#include "fabric/processes/window.h"
#include "fabric/processes/window_buffers.h"
#include "fabric/threads/recorder.h"
#include "fabric/threads/report.h"
#include "fabric/work/cores.h"

namespace jax_ep {
namespace {

// How long a wait for another process looks without pause before it sleeps: longer than
// a process that runs takes to answer, shorter than waking one up.
constexpr std::chrono::microseconds kSpin{30};

std::size_t HalfOf(Epoch epoch) { return epoch % 2; }

ExchangeName NameOf(const Meeting& meeting) {
  return {.site = meeting.span->site,
          .execution = meeting.key.run_id - meeting.span->first_run};
}

bool Works(Phase phase) {
  return phase == Phase::kPublishing || phase == Phase::kPulling;
}

}  // namespace

Channel::Channel(const std::vector<std::int32_t>& process_of, std::int32_t here,
                 Options options)
    : process_of_(process_of), here_(here), options_(std::move(options)) {
  thread_ = std::thread([this] { Serve(); });
}

Channel::~Channel() {
  {
    const std::scoped_lock lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void Channel::Take(std::shared_ptr<Meeting> meeting) {
  {
    const std::scoped_lock lock(mutex_);
    if (!failure_) {
      waiting_.push_back(std::move(meeting));
      changed_.notify_all();
      return;
    }
  }
  Fail({std::move(meeting)});
}

void Channel::Break(const std::string& why) {
  const std::scoped_lock lock(mutex_);
  if (!failure_) failure_ = why;
  changed_.notify_all();
}

void Channel::Serve() {
  for (;;) {
    Failure failure;
    const std::shared_ptr<Meeting> meeting = NextMeeting(failure);
    if (meeting == nullptr && !failure) return;  // the channel ends
    if (meeting != nullptr) meeting->NoteEpoch(epoch_, named_);
    if (!failure) failure = Exchange(*meeting);
    if (failure) {
      GiveUp(*failure, {meeting});
      return;
    }
    std::vector<Done> done;
    std::ranges::copy_if(std::move(meeting->done), std::back_inserter(done),
                         [](const Done& rank) { return rank != nullptr; });
    TellAll(std::move(done), options_.schedule);
  }
}

// Waits for the exchange of the next epoch: for the leader, whichever comes together
// first; for the others, the one that the leader names.
std::shared_ptr<Meeting> Channel::NextMeeting(Failure& failure) {
  ExchangeName name;
  {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return stopping_ || failure_ || !waiting_.empty(); });
    if (stopping_) return nullptr;
    failure = failure_;
    if (failure) return nullptr;
    name = NameOf(*waiting_.front());
  }
  ++epoch_;
  timeout_ = options_.timeout();
  deadline_ = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                 std::min(timeout_, kLongestWait));
  if (!is_connected_) failure = ConnectToOthers();
  if (failure) return nullptr;
  if (options_.is_ordered) return TakeFirst(failure);
  failure = NameExchange(name);
  if (failure) return nullptr;
  return FindMeeting(name, failure);
}

std::shared_ptr<Meeting> Channel::TakeFirst(Failure& failure) {
  const std::scoped_lock lock(mutex_);
  failure = failure_;
  if (failure) return nullptr;
  std::shared_ptr<Meeting> meeting = std::move(waiting_.front());
  waiting_.pop_front();
  return meeting;
}

// Names the exchange that its own ranks have come to, if it leads; otherwise waits for
// the leader to name one, which may be another.
Channel::Failure Channel::NameExchange(ExchangeName& name) {
  ProcessWords& own = own_->words();
  own.came_to.store(Digest(name), std::memory_order_relaxed);
  if (leads()) {
    own.names[HalfOf(epoch_)] = name;
    own.announced.store(epoch_, std::memory_order_release);
    Ring(own.bell);
    return std::nullopt;
  }
  Enter(Phase::kFollowing);
  Neighbor& leader = **std::ranges::find_if(
      neighbors_, [&](const auto& n) { return n->process() == process_of_[0]; });
  Failure failure = Await(
      leader,
      [this](const ProcessWords& words) {
        return words.announced.load(std::memory_order_acquire) >= epoch_;
      },
      "named the exchange");
  if (failure) return failure;
  named_ = RecordsCalls() ? SteadyNow() : 0;
  name = leader.words().names[HalfOf(epoch_)];
  Enter(Phase::kMeeting);
  return std::nullopt;
}

// Shows this process's words to the others.
Channel::Failure Channel::OpenOwn() {
  phase_ = Phase::kConnecting;
  auto own = options_.open();
  if (auto* problem = std::get_if<std::string>(&own)) return Trouble(Now(), *problem);
  own_ = std::move(std::get<std::unique_ptr<Showcase>>(own));
  return std::nullopt;
}

Channel::Failure Channel::ConnectToOthers() {
  if (Failure failure = OpenOwn()) return failure;
  Enter(Phase::kConnecting);
  auto neighbors = options_.connect(deadline_, [this] { return WhatStopsIt(); });
  if (auto* problem = std::get_if<std::string>(&neighbors)) {
    return Trouble(Now(), *problem);
  }
  neighbors_ = std::move(std::get<Neighbors>(neighbors));
  is_connected_ = true;
  return std::nullopt;
}

std::shared_ptr<Meeting> Channel::FindMeeting(const ExchangeName& name,
                                              Failure& failure) {
  std::unique_lock lock(mutex_);
  auto found = waiting_.end();
  const auto is_there = [&] {
    found = std::ranges::find_if(
        waiting_, [&](const auto& meeting) { return NameOf(*meeting) == name; });
    return stopping_ || failure_ || found != waiting_.end();
  };
  if (!changed_.wait_until(lock, deadline_, is_there)) {
    failure = OtherCallTrouble(Now(), name, waiting_.front()->print);
    return nullptr;
  }
  if (stopping_) return nullptr;
  failure = failure_;
  if (failure) return nullptr;
  std::shared_ptr<Meeting> meeting = std::move(*found);
  waiting_.erase(found);
  return meeting;
}

Channel::Failure Channel::Exchange(Meeting& meeting) {
  if (Failure failure = AwaitReaders()) return failure;
  if (Failure failure = Publish(meeting)) return failure;
  if (Failure failure = AwaitOthers(meeting)) return failure;
  if (Failure failure = FillTables(meeting)) return failure;
  Enter(Phase::kPulling);
  meeting.NoteBeginning();
  RunTogether(std::move(meeting.works), options_.schedule, options_.max_threads);
  meeting.NoteEnd();
  ProcessWords& own = own_->words();
  // Releases the half: all reads of it have ended.
  own.finished.store(epoch_, std::memory_order_release);
  Enter(Phase::kIdle);
  return std::nullopt;
}

// Waits until everybody has finished with what the half of this epoch held.
Channel::Failure Channel::AwaitReaders() {
  Enter(Phase::kReusing);
  for (const auto& neighbor : neighbors_) {
    Failure failure = Await(
        *neighbor,
        [this](const ProcessWords& words) {
          return words.finished.load(std::memory_order_acquire) + 2 >= epoch_;
        },
        "finished with the one before the last");
    if (failure) return failure;
  }
  return std::nullopt;
}

// Fills the half of this epoch.
Channel::Failure Channel::Publish(const Meeting& meeting) {
  Enter(Phase::kPublishing);
  const HalfLayout layout(meeting.shared_bytes);
  const std::size_t half = HalfOf(epoch_);
  const std::size_t bytes = layout.BytesOf(meeting.num_expected);
  std::string problem;
  char* window = own_->Half(half, bytes, problem);
  if (window == nullptr) return OwnWindowTrouble(Now(), bytes, problem);
  RunTogether(PublicationWorks(meeting, layout, window), options_.schedule,
              options_.max_threads);
  ProcessWords& own = own_->words();
  own.prints[half] = Share(meeting.print, meeting.shared_bytes);
  own.published.store(epoch_, std::memory_order_release);
  if (meeting.recording) meeting.recording->NotePublished();
  Enter(Phase::kAwaiting);
  return std::nullopt;
}

Channel::Failure Channel::AwaitOthers(const Meeting& meeting) {
  const SharedPrint print = Share(meeting.print, meeting.shared_bytes);
  for (const auto& neighbor : neighbors_) {
    Failure failure = Await(
        *neighbor,
        [this](const ProcessWords& words) {
          return words.published.load(std::memory_order_acquire) >= epoch_;
        },
        "published");
    if (failure) return failure;
    const SharedPrint theirs = neighbor->words().prints[HalfOf(epoch_)];
    if (theirs != print) {
      return MismatchTrouble(Now(), print, neighbor->process(), theirs);
    }
    if (meeting.recording) meeting.recording->NoteSeen(neighbor->process());
  }
  return std::nullopt;
}

// Tells the kernels where the other processes' ranks have their buffers.
Channel::Failure Channel::FillTables(Meeting& meeting) {
  const HalfLayout layout(meeting.shared_bytes);
  for (const auto& neighbor : neighbors_) {
    const auto num_ranks =
        static_cast<std::size_t>(std::ranges::count(process_of_, neighbor->process()));
    std::string problem;
    const char* window =
        neighbor->Half(HalfOf(epoch_), layout.BytesOf(num_ranks), problem);
    if (window == nullptr) {
      return WindowTrouble(Now(), neighbor->process(), problem);
    }
    FindBuffers(meeting, layout, window, neighbor->process());
  }
  return std::nullopt;
}

// Waits until `done` holds of a neighbor's words. It reads them with acquire, and they
// are written before the bell is rung: what was not seen then rings later.
Channel::Failure Channel::Await(Neighbor& neighbor,
                                const std::function<bool(const ProcessWords&)>& done,
                                const char* what) {
  const ProcessWords& words = neighbor.words();
  const Clock::time_point spin_until = Clock::now() + kSpin;
  while (!done(words) && Clock::now() < spin_until) Pause();
  for (;;) {
    const std::uint32_t seen = words.bell.load(std::memory_order_acquire);
    const bool was_alive = neighbor.alive();
    if (done(words)) return std::nullopt;
    const Clock::time_point now = Clock::now();
    if (!was_alive || now >= deadline_) {
      return NeighborTrouble(Now(), neighbors_, neighbor, what);
    }
    if (const Neighbor* quitter = Quitter()) {
      return NeighborTrouble(Now(), neighbors_, *quitter, what);
    }
    if (Failure failure = WhatStopsIt()) return failure;
    AwaitRing(words.bell, seen, std::min<Clock::duration>(kLook, deadline_ - now));
  }
}

// What there is to stop a wait for others.
Channel::Failure Channel::WhatStopsIt() {
  const std::scoped_lock lock(mutex_);
  if (failure_) return failure_;
  if (stopping_) return "the channel ends";
  return std::nullopt;
}

// Returns a neighbor that gave up, if there is one, or rather one that ended, which may
// be why.
const Neighbor* Channel::Quitter() const {
  const auto quitter = std::ranges::find_if(
      neighbors_, [](const auto& neighbor) { return neighbor->has_given_up(); });
  if (quitter == neighbors_.end()) return nullptr;
  const auto ended = std::ranges::find_if(neighbors_, [](const auto& neighbor) {
    return !neighbor->has_given_up() && !neighbor->alive();
  });
  return (ended != neighbors_.end() ? *ended : *quitter).get();
}

// For errors.
Standing Channel::Now() const {
  return {.process_of = process_of_,
          .here = here_,
          .epoch = epoch_,
          .phase = phase_,
          .timeout = timeout_};
}

void Channel::Enter(Phase phase) {
  phase_ = phase;
  ProcessWords& own = own_->words();
  own.epoch.store(epoch_, std::memory_order_relaxed);
  own.phase.store(phase, std::memory_order_relaxed);
  if (Works(phase)) ShareCores(own);
  Ring(own.bell);
  if (options_.on_phase) options_.on_phase(phase, epoch_);
}

// Leaves its core to another process's thread that works there. Of two only one goes,
// or they would meet again elsewhere.
void Channel::ShareCores(ProcessWords& own) const {
  const std::int32_t core = ThisCore();
  const auto works_here = [&](const auto& neighbor) {
    const ProcessWords& words = neighbor->words();
    return neighbor->process() < here_ &&
           words.core.load(std::memory_order_relaxed) == core &&
           Works(words.phase.load(std::memory_order_relaxed));
  };
  if (std::ranges::any_of(neighbors_, works_here)) LeaveCore();
  own.core.store(ThisCore(), std::memory_order_relaxed);
}

// From here on every exchange of this channel fails.
void Channel::GiveUp(const std::string& why,
                     std::vector<std::shared_ptr<Meeting>> meetings) {
  // Even before the first exchange: the others may be at it.
  if (epoch_ == 0) OpenOwn();
  if (own_ != nullptr) {
    ProcessWords& own = own_->words();
    own.gave_up.store(epoch_ == 0 ? 1 : epoch_, std::memory_order_release);
    Ring(own.bell);
  }
  bool is_news = false;
  {
    const std::scoped_lock lock(mutex_);
    is_news = !failure_;
    if (is_news) failure_ = why;
    std::ranges::move(waiting_, std::back_inserter(meetings));
    waiting_.clear();
  }
  std::erase(meetings, nullptr);
  // Once for all exchanges that fail from now on.
  if (is_news) Report(meetings.empty() ? why : meetings.front()->ReportOf(why));
  Fail(meetings);
}

void Channel::Fail(const std::vector<std::shared_ptr<Meeting>>& meetings) {
  std::string why;
  {
    const std::scoped_lock lock(mutex_);
    why = *failure_;
  }
  for (const auto& meeting : meetings) {
    TellFailed(meeting->TakeNotices(why), options_.schedule);
  }
}

}  // namespace jax_ep
