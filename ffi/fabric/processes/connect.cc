// Implements connect.h: the windows behind the words, and the search for them.

#include "fabric/processes/connect.h"

#include <sys/types.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "fabric/processes/futex.h"
#include "fabric/processes/shared_file.h"

namespace jax_ep {
namespace {

// The files of a window.
using Halves = std::array<std::unique_ptr<SharedFile>, 2>;

// In place of the number of a file that could not be made: no file has a negative one.
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

class OtherChannel : public Neighbor {
 public:
  OtherChannel(const OtherProcess& other, const ProcessWords& words, Halves halves)
      : other_(other), words_(words), halves_(std::move(halves)) {}

  const ProcessWords& words() const override { return words_; }
  const char* Half(std::size_t half, std::size_t bytes, std::string& problem) override {
    return static_cast<const char*>(halves_[half]->Map(bytes, problem));
  }
  bool alive() const override { return other_.alive(); }
  std::int32_t process() const override { return other_.index(); }

 private:
  const OtherProcess& other_;
  const ProcessWords& words_;
  const Halves halves_;
};

class OwnChannel : public Showcase {
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
class Search {
 public:
  Search(std::vector<const OtherProcess*> others, std::uint64_t key,
         Clock::time_point deadline, const Interruption& interruption)
      : others_(std::move(others)),
        key_(key),
        deadline_(deadline),
        interruption_(interruption) {}

  const std::vector<const OtherProcess*>& others() const { return others_; }

  // Waits until a process shows its words and window.
  std::variant<const ProcessWords*, std::string> Await(
      const OtherProcess& other) const {
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
  bool GaveUp(const OtherProcess& other) const {
    const ProcessWords* words = other.Find(key_);
    return words != nullptr && words->gave_up.load(std::memory_order_acquire) != 0;
  }

  // Who gave up, or rather who ended, which may be why.
  std::optional<std::string> TroubleElsewhere() const {
    const auto gave_up = [&](const OtherProcess* other) { return GaveUp(*other); };
    const auto quitter = std::ranges::find_if(others_, gave_up);
    if (quitter == others_.end()) return std::nullopt;
    const auto ended = std::ranges::find_if(others_, [&](const OtherProcess* other) {
      return !gave_up(other) && !other->alive();
    });
    if (ended != others_.end()) return (*ended)->name() + " has ended";
    return (*quitter)->name() + " has given up";
  }

  const std::vector<const OtherProcess*> others_;
  const std::uint64_t key_;
  const Clock::time_point deadline_;
  const Interruption& interruption_;
};

}  // namespace

std::variant<std::unique_ptr<Showcase>, std::string> ShowChannel(Board& board,
                                                                 ProcessWords& words,
                                                                 std::uint64_t key) {
  Halves halves;
  const auto problem = MakeHalves(halves);
  if (problem) {
    words.window_files = {kNoFile, kNoFile};
    words.gave_up.store(1, std::memory_order_relaxed);
  } else {
    words.window_files = {halves[0]->number(), halves[1]->number()};
  }
  words.key.store(key, std::memory_order_release);
  Ring(board.opened);
  if (problem) return "could not make its window: " + *problem;
  return std::make_unique<OwnChannel>(words, std::move(halves));
}

std::variant<Neighbors, std::string> ConnectTo(std::vector<const OtherProcess*> others,
                                               std::uint64_t key,
                                               Clock::time_point deadline,
                                               const Interruption& interruption) {
  const Search search(std::move(others), key, deadline, interruption);
  Neighbors neighbors;
  for (const OtherProcess* other : search.others()) {
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
