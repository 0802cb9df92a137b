#include "fabric/processes/host.h"

#include <poll.h>
#include <unistd.h>

#if defined(__linux__)
#include <sys/syscall.h>
#endif

#include <algorithm>
#include <atomic>
#include <cerrno>
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

#include "fabric/processes/futex.h"
#include "fabric/processes/hash.h"
#include "fabric/work/work_share.h"

namespace jax_ep {
namespace {

// What the words of one channel carry in all processes; never 0.
std::uint64_t Hash(const std::vector<std::int32_t>& process_of, std::int64_t group) {
  std::uint64_t hash = kHashSeed;
  for (const std::int32_t process : process_of) hash = Mix(hash, process);
  return Mix(hash, group) | 1;
}

// Finds a key in a table that fills up from its start, or returns null.
template <typename Table>
auto* FindKey(Table& table, std::uint64_t key) {
  for (auto& entry : table) {
    const std::uint64_t found = entry.key.load(std::memory_order_acquire);
    if (found == key) return &entry;
    if (found == 0) break;
  }
  return static_cast<decltype(table.data())>(nullptr);
}

// The files of a window.
using Halves = std::array<std::unique_ptr<SharedFile>, 2>;

// In place of the number of a file that could not be made.
constexpr std::int32_t kNoFile = -1;

// These return what went wrong.
std::optional<std::string> Take(SharedFile::OrFailure file,
                                std::unique_ptr<SharedFile>& to) {
  if (auto* problem = std::get_if<std::string>(&file)) return *problem;
  to = std::move(std::get<std::unique_ptr<SharedFile>>(file));
  return std::nullopt;
}

std::optional<std::string> MakeHalves(Halves& halves) {
  for (auto& half : halves) {
    if (auto problem = Take(SharedFile::Create(), half)) return problem;
  }
  return std::nullopt;
}

std::optional<std::string> OpenHalves(pid_t process,
                                      const std::array<std::int32_t, 2>& numbers,
                                      Halves& halves) {
  for (std::size_t i = 0; i < halves.size(); ++i) {
    if (auto problem = Take(SharedFile::OpenOf(process, numbers[i]), halves[i])) {
      return problem;
    }
  }
  return std::nullopt;
}

}  // namespace

// Another process of the job.
class Host::Other {
 public:
  // Opens its board, or says why it cannot.
  static std::variant<std::unique_ptr<Other>, std::string> Open(std::int32_t index,
                                                                BoardAddress address);
  ~Other() {
    if (handle_ >= 0) close(handle_);
  }
  Other(const Other&) = delete;
  Other& operator=(const Other&) = delete;

  const Board& board() const { return *board_; }
  std::int32_t index() const { return index_; }
  pid_t process() const { return process_; }
  // "process 1 (pid 77)"
  std::string name() const {
    return "process " + std::to_string(index_) + " (pid " + std::to_string(process_) +
           ")";
  }

  // Its handle becomes readable when it ends. Where there are no such handles, only the
  // time-out tells.
  bool alive() const {
    if (handle_ < 0) return true;
    pollfd poll_for = {.fd = handle_, .events = POLLIN, .revents = 0};
    return poll(&poll_for, 1, 0) <= 0;
  }

  const ProcessWords* Find(std::uint64_t key) const {
    return FindKey(board_->words, key);
  }

 private:
  Other(std::int32_t index, pid_t process) : index_(index), process_(process) {}

  const std::int32_t index_;
  const pid_t process_;
  std::unique_ptr<SharedFile> file_;
  const Board* board_ = nullptr;
  int handle_ = -1;
};

std::variant<std::unique_ptr<Host::Other>, std::string> Host::Other::Open(
    std::int32_t index, BoardAddress address) {
  std::unique_ptr<Other> other(new Other(index, address.process));
  const std::string whose = "the board of " + other->name();
  auto file = SharedFile::OpenOf(address.process, address.number);
  if (auto* problem = std::get_if<std::string>(&file)) {
    return whose + " cannot be opened: " + *problem;
  }
  other->file_ = std::move(std::get<std::unique_ptr<SharedFile>>(file));
  std::string problem;
  other->board_ = static_cast<const Board*>(other->file_->Map(sizeof(Board), problem));
  if (other->board_ == nullptr) return whose + " cannot be mapped: " + problem;
#if defined(SYS_pidfd_open)
  other->handle_ = static_cast<int>(syscall(SYS_pidfd_open, address.process, 0));
  // Older systems have no such handles, and some containers forbid them.
  if (other->handle_ < 0 && errno != ENOSYS && errno != EPERM) {
    return other->name() + " cannot be watched: " + SystemProblem("pidfd_open");
  }
#endif
  return other;
}

class Host::OtherChannel : public Neighbor {
 public:
  OtherChannel(const Other& other, const ProcessWords& words, Halves halves)
      : other_(other), words_(words), halves_(std::move(halves)) {}

  const ProcessWords& words() const override { return words_; }
  const char* Half(std::size_t half, std::size_t bytes, std::string& problem) override {
    return static_cast<const char*>(halves_[half]->Map(bytes, problem));
  }
  bool alive() const override { return other_.alive(); }
  std::int32_t process() const override { return other_.index(); }

 private:
  const Other& other_;
  const ProcessWords& words_;
  const Halves halves_;
};

class Host::OwnChannel : public Showcase {
 public:
  OwnChannel(ProcessWords& words, Halves halves)
      : words_(words), halves_(std::move(halves)) {}

  ProcessWords& words() override { return words_; }
  char* Half(std::size_t half, std::size_t bytes, std::string& problem) override {
    return static_cast<char*>(halves_[half]->Map(bytes, problem));
  }

 private:
  ProcessWords& words_;
  const Halves halves_;
};

// How long and for what a channel's thread looks for the words of other processes.
class Host::Search {
 public:
  Search(std::vector<const Other*> others, std::uint64_t key,
         Clock::time_point deadline, const Interruption& interruption)
      : others_(std::move(others)),
        key_(key),
        deadline_(deadline),
        interruption_(interruption) {}

  const std::vector<const Other*>& others() const { return others_; }

  // Waits until a process shows its words and window.
  std::variant<const ProcessWords*, std::string> Await(const Other& other) const {
    const Board& board = other.board();
    for (;;) {
      const std::uint32_t seen = board.opened.load(std::memory_order_acquire);
      const bool was_alive = other.alive();
      if (const ProcessWords* words = other.Find(key_)) {
        if (words->window_files[0] == kNoFile) return other.name() + " has given up";
        return words;
      }
      const Clock::time_point now = Clock::now();
      if (!was_alive) return other.name() + " has ended";
      if (now >= deadline_) {
        return other.name() +
               " had not come to the first exchange of these ranks in time";
      }
      if (auto trouble = TroubleElsewhere()) return *trouble;
      if (auto interruption = interruption_()) return *interruption;
      AwaitRing(board.opened, seen, std::min<Clock::duration>(kLook, deadline_ - now));
    }
  }

 private:
  bool GaveUp(const Other& other) const {
    const ProcessWords* words = other.Find(key_);
    return words != nullptr && words->gave_up.load(std::memory_order_acquire) != 0;
  }

  // Who gave up, or rather who ended, which may be why.
  std::optional<std::string> TroubleElsewhere() const {
    const auto gave_up = [&](const Other* other) { return GaveUp(*other); };
    const auto quitter = std::ranges::find_if(others_, gave_up);
    if (quitter == others_.end()) return std::nullopt;
    const auto ended = std::ranges::find_if(others_, [&](const Other* other) {
      return !gave_up(other) && !other->alive();
    });
    if (ended != others_.end()) return (*ended)->name() + " has ended";
    return (*quitter)->name() + " has given up";
  }

  const std::vector<const Other*> others_;
  const std::uint64_t key_;
  const Clock::time_point deadline_;
  const Interruption& interruption_;
};

std::variant<std::unique_ptr<Host>, std::string> Host::Create(std::int32_t here,
                                                              Timeout timeout) {
  auto created = SharedFile::Create();
  if (auto* problem = std::get_if<std::string>(&created)) return *problem;
  auto file = std::move(std::get<std::unique_ptr<SharedFile>>(created));
  std::string problem;
  auto* board = static_cast<Board*>(file->Map(sizeof(Board), problem));
  if (board == nullptr) return "a board of shared memory cannot be mapped: " + problem;
  return std::unique_ptr<Host>(
      new Host(here, std::move(file), board, std::move(timeout)));
}

// A new file is all zeros, and so is a board without channels.
Host::Host(std::int32_t here, std::unique_ptr<SharedFile> file, Board* board,
           Timeout timeout)
    : file_(std::move(file)),
      board_(board),
      timeout_(std::move(timeout)),
      here_(here) {}

Host::~Host() = default;

BoardAddress Host::address() const {
  return {.process = getpid(), .number = file_->number()};
}

std::optional<std::string> Host::Open(std::int32_t process, BoardAddress address) {
  if (process == here_ || Find(process) != nullptr) return std::nullopt;
  auto other = Other::Open(process, address);
  if (auto* problem = std::get_if<std::string>(&other)) return *problem;
  const std::scoped_lock lock(mutex_);
  others_.emplace(process, std::move(std::get<std::unique_ptr<Other>>(other)));
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

const Board::FirstRunsOfRank* Host::FirstRunsOf(std::int32_t process,
                                                std::int64_t group, std::int32_t rank) {
  const Other* other = Find(process);
  const Board& board = other == nullptr ? *board_ : other->board();
  return FindKey(board.first_runs, Hash({rank}, group));
}

bool Host::IsIn(std::int32_t process, const std::vector<std::int32_t>& process_of,
                std::int64_t group, const ExchangeName& name) {
  const Other* other = Find(process);
  if (other == nullptr) return false;
  const ProcessWords* words = other->Find(Hash(process_of, group));
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
            .open = [this, key] { return OpenOwn(Hash(key.first, key.second)); },
            .connect =
                [this, key](Clock::time_point deadline, const auto& interruption) {
                  return ConnectTo(key, deadline, interruption);
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

// Shows this process's words for a channel. Words without a window say only that this
// process gave up, and are there so that the others need not wait for it.
std::variant<std::unique_ptr<Showcase>, std::string> Host::OpenOwn(std::uint64_t key) {
  Halves halves;
  const auto problem = MakeHalves(halves);
  const std::scoped_lock lock(mutex_);
  if (num_channels_ == Board::kMaxChannels) {
    return "this process exchanges in " + std::to_string(Board::kMaxChannels) +
           " groups of ranks already, which is the most it can";
  }
  ProcessWords& words = board_->words[num_channels_++];
  if (problem) {
    words.window_files = {kNoFile, kNoFile};
    words.gave_up.store(1, std::memory_order_relaxed);
  } else {
    words.window_files = {halves[0]->number(), halves[1]->number()};
  }
  words.key.store(key, std::memory_order_release);
  Ring(board_->opened);
  if (problem) return "could not make its window: " + *problem;
  return std::make_unique<OwnChannel>(words, std::move(halves));
}

std::vector<const Host::Other*> Host::OthersOf(const ChannelKey& key) {
  const std::set<std::int32_t> processes(key.first.begin(), key.first.end());
  std::vector<const Other*> others;
  for (const std::int32_t process : processes) {
    if (process != here_) others.push_back(Find(process));
  }
  return others;
}

// Finds the words of the others for a channel, and the windows that they name.
std::variant<Neighbors, std::string> Host::ConnectTo(const ChannelKey& key,
                                                     Clock::time_point deadline,
                                                     const Interruption& interruption) {
  const Search search(OthersOf(key), Hash(key.first, key.second), deadline,
                      interruption);
  Neighbors neighbors;
  for (const Other* other : search.others()) {
    auto found = search.Await(*other);
    if (auto* problem = std::get_if<std::string>(&found)) return *problem;
    const ProcessWords& words = *std::get<const ProcessWords*>(found);
    Halves halves;
    if (const auto problem = OpenHalves(other->process(), words.window_files, halves)) {
      if (!other->alive()) return other->name() + " has ended";
      return "could not open the window of " + other->name() + ": " + *problem;
    }
    neighbors.push_back(
        std::make_unique<OtherChannel>(*other, words, std::move(halves)));
  }
  return neighbors;
}

}  // namespace jax_ep
