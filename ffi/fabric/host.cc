#include "fabric/host.h"

#include <poll.h>
#include <unistd.h>

#if defined(__linux__)
#include <sys/syscall.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "fabric/futex.h"
#include "fabric/work_share.h"

namespace jax_ep {
namespace {

// What the words of one channel carry in all processes; never 0.
std::uint64_t Hash(const std::vector<std::int32_t>& process_of, std::int64_t group) {
  std::uint64_t hash = 0xcbf29ce484222325ULL;
  const auto add = [&](std::int64_t number) {
    hash = (hash ^ static_cast<std::uint64_t>(number)) * 0x100000001b3ULL;
    hash ^= hash >> 29;
  };
  for (const std::int32_t process : process_of) add(process);
  add(group);
  return hash | 1;
}

// Finds a key in a table that fills up from its start, or returns null.
template <typename Table>
auto* FindKey(Table& table, std::uint64_t key) {
  for (auto& entry : table) {
    const std::uint64_t found = entry.key.load(std::memory_order_acquire);
    if (found == key) return &entry;
    if (found == 0) break;
  }
  return static_cast<decltype(&table[0])>(nullptr);
}

}  // namespace

// Another process of the job.
class Host::Other {
 public:
  Other(std::int32_t index, BoardAddress address, std::unique_ptr<SharedFile> file)
      : index_(index), process_(address.process), file_(std::move(file)) {
    board_ = static_cast<const Board*>(file_->Map(sizeof(Board)));
#if defined(SYS_pidfd_open)
    handle_ = static_cast<int>(syscall(SYS_pidfd_open, process_, 0));
#endif
  }
  ~Other() {
    if (handle_ >= 0) close(handle_);
  }
  Other(const Other&) = delete;
  Other& operator=(const Other&) = delete;

  const Board* board() const { return board_; }
  std::int32_t index() const { return index_; }
  pid_t process() const { return process_; }

  // Its handle becomes readable when it ends. Where there are no such handles, only the
  // time-out tells.
  bool alive() const {
    if (handle_ < 0) return true;
    pollfd poll_for = {.fd = handle_, .events = POLLIN, .revents = 0};
    return poll(&poll_for, 1, 0) == 0;
  }

 private:
  const std::int32_t index_;
  const pid_t process_;
  const std::unique_ptr<SharedFile> file_;
  const Board* board_;
  int handle_ = -1;
};

class Host::OtherChannel : public Neighbor {
 public:
  OtherChannel(const Other& other, const ProcessWords& words,
               std::array<std::unique_ptr<SharedFile>, 2> halves)
      : other_(other), words_(words), halves_(std::move(halves)) {}

  const ProcessWords& words() const override { return words_; }
  const char* Half(std::size_t half, std::size_t bytes) override {
    return static_cast<const char*>(halves_[half]->Map(bytes));
  }
  bool alive() const override { return other_.alive(); }
  std::int32_t process() const override { return other_.index(); }

 private:
  const Other& other_;
  const ProcessWords& words_;
  const std::array<std::unique_ptr<SharedFile>, 2> halves_;
};

class Host::OwnChannel : public Showcase {
 public:
  OwnChannel(ProcessWords& words, std::array<std::unique_ptr<SharedFile>, 2> halves)
      : words_(words), halves_(std::move(halves)) {}

  ProcessWords& words() override { return words_; }
  char* Half(std::size_t half, std::size_t bytes) override {
    return static_cast<char*>(halves_[half]->Map(bytes));
  }

 private:
  ProcessWords& words_;
  const std::array<std::unique_ptr<SharedFile>, 2> halves_;
};

std::variant<std::unique_ptr<Host>, std::string> Host::Create(std::int32_t here,
                                                              Timeout timeout) {
  auto file = SharedFile::Create();
  if (auto* problem = std::get_if<std::string>(&file)) return *problem;
  std::unique_ptr<Host> host(
      new Host(here, std::move(std::get<std::unique_ptr<SharedFile>>(file)),
               std::move(timeout)));
  if (host->board_ == nullptr) return "a board of shared memory cannot be mapped";
  return host;
}

// A new file is all zeros, and so is a board without channels.
Host::Host(std::int32_t here, std::unique_ptr<SharedFile> file, Timeout timeout)
    : file_(std::move(file)),
      board_(static_cast<Board*>(file_->Map(sizeof(Board)))),
      timeout_(std::move(timeout)),
      here_(here) {}

Host::~Host() = default;

BoardAddress Host::address() const {
  return {.process = getpid(), .number = file_->number()};
}

std::optional<std::string> Host::Open(std::int32_t process, BoardAddress address) {
  if (process == here_ || Find(process) != nullptr) return std::nullopt;
  auto file = SharedFile::OpenOf(address.process, address.number);
  if (auto* problem = std::get_if<std::string>(&file)) return *problem;
  auto other = std::make_unique<Other>(
      process, address, std::move(std::get<std::unique_ptr<SharedFile>>(file)));
  if (other->board() == nullptr) {
    return "the board of process " + std::to_string(process) + " cannot be mapped";
  }
  const std::scoped_lock lock(mutex_);
  others_.emplace(process, std::move(other));
  return std::nullopt;
}

const Host::Other* Host::Find(std::int32_t process) {
  const std::scoped_lock lock(mutex_);
  const auto found = others_.find(process);
  return found == others_.end() ? nullptr : found->second.get();
}

bool Host::IsAlive(std::int32_t process) {
  const Other* other = Find(process);
  return other == nullptr || other->alive();
}

Board::FirstRunsOfRank* Host::OwnFirstRuns(std::int64_t group, std::int32_t rank) {
  const std::uint64_t key = Hash({rank}, group);
  const std::scoped_lock lock(mutex_);
  if (auto* found = FindKey(board_->first_runs, key)) return found;
  auto* unused = FindKey(board_->first_runs, 0);
  if (unused != nullptr) unused->key.store(key, std::memory_order_release);
  return unused;
}

std::optional<std::int32_t> Host::BeginFirstRun(std::int64_t group, std::int32_t rank) {
  Board::FirstRunsOfRank* own = OwnFirstRuns(group, rank);
  if (own == nullptr) return std::nullopt;
  return own->begun.fetch_add(1, std::memory_order_relaxed) + 1;
}

void Host::EndFirstRun(std::int64_t group, std::int32_t rank) {
  OwnFirstRuns(group, rank)->begun.fetch_sub(1, std::memory_order_relaxed);
}

std::int32_t Host::FirstRunsOf(std::int32_t process, std::int64_t group,
                               std::int32_t rank) {
  const Other* other = Find(process);
  const Board& board = other == nullptr ? *board_ : *other->board();
  const auto* found = FindKey(board.first_runs, Hash({rank}, group));
  return found == nullptr ? 0 : found->begun.load(std::memory_order_relaxed);
}

bool Host::IsIn(std::int32_t process, const std::vector<std::int32_t>& process_of,
                std::int64_t group, const ExchangeName& name) {
  const Other* other = Find(process);
  if (other == nullptr) return false;
  const auto* words = FindKey(other->board()->words, Hash(process_of, group));
  return words != nullptr &&
         words->came_to.load(std::memory_order_relaxed) == Digest(name);
}

std::shared_ptr<Relay> Host::ChannelOf(const std::vector<std::int32_t>& process_of,
                                       std::int64_t group) {
  const std::scoped_lock lock(mutex_);
  const ChannelKey key(process_of, group);
  std::shared_ptr<Channel>& channel = channels_[key];
  if (channel == nullptr) {
    const std::set<std::int32_t> processes(process_of.begin(), process_of.end());
    const auto share = NumCores() / static_cast<std::int64_t>(processes.size());
    channel = std::make_shared<Channel>(
        process_of, here_,
        Channel::Options{
            .connect =
                [this, key](Clock::time_point deadline) {
                  return ConnectTo(key, deadline);
                },
            .schedule = [this](auto task) { crew_.Schedule(std::move(task)); },
            .timeout = timeout_,
            .max_threads = std::max<std::int64_t>(share, 1),
            .on_phase = [this](Phase phase, Epoch epoch) { OnPhase(phase, epoch); },
        });
  }
  return channel;
}

void Host::OnPhase(Phase phase, Epoch epoch) {
  std::function<void(Phase, Epoch)> on_phase;
  {
    const std::scoped_lock lock(mutex_);
    on_phase = on_phase_;
  }
  if (on_phase) on_phase(phase, epoch);
}

void Host::set_on_phase(std::function<void(Phase, Epoch)> on_phase) {
  const std::scoped_lock lock(mutex_);
  on_phase_ = std::move(on_phase);
}

std::variant<std::unique_ptr<Showcase>, std::string> Host::OpenOwn(std::uint64_t key) {
  std::array<std::unique_ptr<SharedFile>, 2> halves;
  for (auto& half : halves) {
    auto file = SharedFile::Create();
    if (auto* problem = std::get_if<std::string>(&file)) return *problem;
    half = std::move(std::get<std::unique_ptr<SharedFile>>(file));
  }
  const std::scoped_lock lock(mutex_);
  if (num_channels_ == Board::kMaxChannels) {
    return "this process exchanges in " + std::to_string(Board::kMaxChannels) +
           " groups of ranks already, which is the most it can";
  }
  ProcessWords& words = board_->words[num_channels_++];
  words.window_files = {halves[0]->number(), halves[1]->number()};
  words.key.store(key, std::memory_order_release);
  Ring(board_->opened);
  return std::make_unique<OwnChannel>(words, std::move(halves));
}

// Shows this process's words for a channel, and finds those of the others.
std::variant<Links, std::string> Host::ConnectTo(const ChannelKey& key,
                                                 Clock::time_point deadline) {
  const std::uint64_t hash = Hash(key.first, key.second);
  auto own = OpenOwn(hash);
  if (auto* problem = std::get_if<std::string>(&own)) return *problem;
  Links links = {.own = std::move(std::get<std::unique_ptr<Showcase>>(own)),
                 .neighbors = {}};
  ProcessWords& words = links.own->words();
  words.phase.store(Phase::kConnecting, std::memory_order_relaxed);
  const std::set<std::int32_t> processes(key.first.begin(), key.first.end());
  for (const std::int32_t process : processes) {
    if (process == here_) continue;
    auto neighbor = Find(*Find(process), hash, deadline);
    if (const auto* problem = std::get_if<std::string>(&neighbor)) {
      words.gave_up.store(1, std::memory_order_release);
      Ring(words.bell);
      // Others may be about to open what these words name.
      const std::scoped_lock lock(mutex_);
      given_up_.push_back(std::move(links.own));
      return *problem;
    }
    links.neighbors.push_back(std::move(std::get<std::unique_ptr<Neighbor>>(neighbor)));
  }
  return links;
}

std::variant<std::unique_ptr<Neighbor>, std::string> Host::Find(
    const Other& other, std::uint64_t key, Clock::time_point deadline) {
  const std::string name = "process " + std::to_string(other.index()) + " (pid " +
                           std::to_string(other.process()) + ")";
  const Board& board = *other.board();
  const ProcessWords* words = nullptr;
  for (;;) {
    const std::uint32_t seen = board.opened.load(std::memory_order_acquire);
    const bool was_alive = other.alive();
    words = FindKey(board.words, key);
    if (words != nullptr) break;
    const Clock::time_point now = Clock::now();
    if (!was_alive) return name + " has ended";
    if (now >= deadline) {
      return name + " had not come to the first exchange of these ranks in time";
    }
    AwaitRing(board.opened, seen, std::min<Clock::duration>(kLook, deadline - now));
  }
  std::array<std::unique_ptr<SharedFile>, 2> halves;
  for (std::size_t i = 0; i < halves.size(); ++i) {
    auto file = SharedFile::OpenOf(other.process(), words->window_files[i]);
    if (auto* problem = std::get_if<std::string>(&file)) return *problem;
    halves[i] = std::move(std::get<std::unique_ptr<SharedFile>>(file));
  }
  return std::make_unique<OtherChannel>(other, *words, std::move(halves));
}

}  // namespace jax_ep
