// Implements forked_processes.h.

#include "forked_processes.h"

#include <sys/resource.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "check.h"

namespace jax_ep {
namespace {

using std::chrono::duration;

// What a child does: tells of its board, is told of the other, and then its body.
bool Run(std::int32_t here, duration<double> timeout, const Child::Body& body, int from,
         int to, bool is_ordered) {
  Side side(here, timeout, is_ordered);
  const BoardAddress mine = side.address();
  BoardAddress theirs{};
  if (write(to, &mine, sizeof(mine)) < 0) return false;
  if (read(from, &theirs, sizeof(theirs)) != sizeof(theirs)) return false;
  return !side.host().Open(1 - here, theirs) && body(side);
}

}  // namespace

std::unique_ptr<Host> NewHost(std::int32_t here, duration<double> timeout,
                              bool is_ordered) {
  auto host = Host::Create(here, [timeout] { return timeout; }, is_ordered);
  if (auto* problem = std::get_if<std::string>(&host)) {
    EP_CHECK_EQ(*problem, "");
    return nullptr;
  }
  return std::move(std::get<std::unique_ptr<Host>>(host));
}

Side::Side(std::int32_t here, duration<double> timeout, bool is_ordered)
    : here_(here), host_(NewHost(here, timeout, is_ordered)) {
  point_.SetTimeout(timeout);
}

std::shared_ptr<const Span> Side::SpanOf(const std::vector<std::int32_t>& process_of,
                                         std::int32_t group) {
  // The host owns the channel.
  Relay* relay = host_->ChannelOf(process_of, group).get();
  return std::make_shared<Span>(
      Span{.process_of = process_of,
           .here = here_,
           .site = 1,
           .first_run = 0,
           .relay = std::shared_ptr<Relay>(std::shared_ptr<void>(), relay)});
}

SpanOutcome Side::Make(SpanCall call, const std::vector<std::int32_t>& process_of,
                       std::size_t first) {
  const auto span = SpanOf(process_of, call.group);
  std::vector<PendingSpanCall> pending;
  for (std::size_t rank = first; rank < process_of.size(); ++rank) {
    if (process_of[rank] != here_) continue;
    call.rank = static_cast<std::int32_t>(rank);
    pending.emplace_back(point_, span, call, helpers_.schedule());
  }
  for (const PendingSpanCall& rank : pending) rank.Wait();
  return pending.front().Wait();
}

SpanOutcome Side::MakeTurns(const std::vector<std::int32_t>& process_of,
                            std::int64_t turns) {
  SpanCall call;
  SpanOutcome outcome;
  for (call.turn = 0; call.turn < turns; ++call.turn) {
    // Windows grow past what is mapped at once.
    call.bytes = {call.turn == 6 ? 2'100'000 : call.turn * 301, 77};
    outcome = Make(call, process_of);
    if (outcome.failure || !CheckWorked(call, process_of.size(), outcome)) break;
  }
  return outcome;
}

Child::Child(std::int32_t here, duration<double> timeout, const Body& body,
             bool is_ordered) {
  std::array<int, 2> to_child{};
  std::array<int, 2> from_child{};
  EP_CHECK_EQ(pipe(to_child.data()), 0);
  EP_CHECK_EQ(pipe(from_child.data()), 0);
  process_ = fork();
  if (process_ == 0) {
    _exit(Run(here, timeout, body, to_child[0], from_child[1], is_ordered) ? 0 : 1);
  }
  close(to_child[0]);
  close(from_child[1]);
  to_ = to_child[1];
  from_ = from_child[0];
}

Child::~Child() {
  if (process_ > 0) {
    kill(process_, SIGKILL);
    waitpid(process_, nullptr, 0);
  }
  close(to_);
  close(from_);
}

void Child::Join(Side& own, std::int32_t here) {
  const BoardAddress mine = own.address();
  BoardAddress theirs{};
  EP_CHECK_EQ(read(from_, &theirs, sizeof(theirs)),
              static_cast<ssize_t>(sizeof(theirs)));
  EP_CHECK_EQ(theirs.process, process_);
  EP_CHECK_EQ(write(to_, &mine, sizeof(mine)), static_cast<ssize_t>(sizeof(mine)));
  EP_CHECK_EQ(own.host().Open(1 - here, theirs).value_or(""), "");
  EP_CHECK_EQ(own.host().Open(here, mine).value_or(""), "");
}

void Child::Signal(int signal) const { kill(process_, signal); }

bool Child::Ended() {
  int status = -1;
  waitpid(process_, &status, 0);
  process_ = -1;
  return status == 0;
}

FileLimit::FileLimit(rlim_t most) {
  EP_CHECK_EQ(getrlimit(RLIMIT_NOFILE, &before_), 0);
  const rlimit limit = {.rlim_cur = most, .rlim_max = before_.rlim_max};
  EP_CHECK_EQ(setrlimit(RLIMIT_NOFILE, &limit), 0);
}

FileLimit::~FileLimit() { EP_CHECK_EQ(setrlimit(RLIMIT_NOFILE, &before_), 0); }

}  // namespace jax_ep
