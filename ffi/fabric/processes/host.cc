// Implements host.h.

#include "fabric/processes/host.h"

#include <unistd.h>

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

#include "fabric/processes/connect.h"
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

}  // namespace

std::variant<std::unique_ptr<Host>, std::string> Host::Create(std::int32_t here,
                                                              Timeout timeout,
                                                              bool is_ordered) {
  auto created = SharedFile::Create();
  if (auto* problem = std::get_if<std::string>(&created)) return *problem;
  auto file = std::move(std::get<std::unique_ptr<SharedFile>>(created));
  std::string problem;
  auto* board = static_cast<Board*>(file->Map(sizeof(Board), problem));
  if (board == nullptr) return "a board of shared memory cannot be mapped: " + problem;
  return std::unique_ptr<Host>(
      new Host(here, std::move(file), board, std::move(timeout), is_ordered));
}

// A new file is all zeros, and so is a board without channels.
Host::Host(std::int32_t here, std::unique_ptr<SharedFile> file, Board* board,
           Timeout timeout, bool is_ordered)
    : file_(std::move(file)),
      board_(board),
      timeout_(std::move(timeout)),
      here_(here),
      is_ordered_(is_ordered) {}

Host::~Host() = default;

BoardAddress Host::address() const {
  return {.process = getpid(), .number = file_->number()};
}

std::optional<std::string> Host::Open(std::int32_t process, BoardAddress address) {
  if (process == here_ || Find(process) != nullptr) return std::nullopt;
  auto other = OtherProcess::Open(process, address);
  if (auto* problem = std::get_if<std::string>(&other)) return *problem;
  const std::scoped_lock lock(mutex_);
  others_.emplace(process, std::move(std::get<std::unique_ptr<OtherProcess>>(other)));
  return std::nullopt;
}

const OtherProcess* Host::Find(std::int32_t process) {
  const std::scoped_lock lock(mutex_);
  const auto found = others_.find(process);
  return found == others_.end() ? nullptr : found->second.get();
}

bool Host::IsAlive(std::int32_t process) {
  const OtherProcess* other = Find(process);
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
  const OtherProcess* other = Find(process);
  const Board& board = other == nullptr ? *board_ : other->board();
  return FindKey(board.first_runs, Hash({rank}, group));
}

bool Host::IsIn(std::int32_t process, const std::vector<std::int32_t>& process_of,
                std::int64_t group, const ExchangeName& name) {
  const OtherProcess* other = Find(process);
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
            .open = [this, key] { return Show(key); },
            .connect =
                [this, key](Clock::time_point deadline, const auto& interruption) {
                  return ConnectTo(OthersOf(key), Hash(key.first, key.second), deadline,
                                   interruption);
                },
            .schedule = [this](auto task) { crew_.Schedule(std::move(task)); },
            .timeout = timeout_,
            .max_threads = std::max<std::int64_t>(share, 1),
            .is_ordered = is_ordered_,
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

std::variant<std::unique_ptr<Showcase>, std::string> Host::Show(const ChannelKey& key) {
  const std::scoped_lock lock(mutex_);
  if (num_channels_ == Board::kMaxChannels) {
    return "this process exchanges in " + std::to_string(Board::kMaxChannels) +
           " groups of ranks already, which is the most it can";
  }
  return ShowChannel(*board_, board_->words[num_channels_++],
                     Hash(key.first, key.second));
}

std::vector<const OtherProcess*> Host::OthersOf(const ChannelKey& key) {
  const std::set<std::int32_t> processes(key.first.begin(), key.first.end());
  std::vector<const OtherProcess*> others;
  for (const std::int32_t process : processes) {
    if (process != here_) others.push_back(Find(process));
  }
  return others;
}

}  // namespace jax_ep
