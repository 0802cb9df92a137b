// Implements grid.h: threads as stacks of their own, one running at a time.
#include "grid.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "fabric/work/ieee.h"
#include "fiber_context.h"

thread_local uint3 threadIdx;
thread_local uint3 blockIdx;
thread_local dim3 blockDim;
thread_local dim3 gridDim;

namespace jax_ep::emulation {
namespace {

enum class State : std::uint8_t { kNew, kReady, kWaits, kLeft };

// A thread of a block, with a stack of its own, on which threads of later blocks follow
// once it has left the kernel.
struct Fiber {
  FiberContext context;
  State state = State::kNew;
  Collective waits_for;
  std::uint64_t brought;
  LaneValues seen;  // what the lanes of the last collective brought
};

// As a rule a text is where its equal is.
bool IsSameText(const char* a, const char* b) {
  return a == b || std::strcmp(a, b) == 0;
}

bool IsSame(const Collective& a, const Collective& b) {
  return IsSameText(a.name, b.name) && a.lanes == b.lanes &&
         IsSameText(a.where.file_name(), b.where.file_name()) &&
         a.where.line() == b.where.line() && a.where.column() == b.where.column();
}

std::string TextOf(const Fiber& fiber) {
  if (fiber.state == State::kLeft) return "left the kernel";
  const Collective& collective = fiber.waits_for;
  std::ostringstream text;
  text << "in " << collective.name << " at " << collective.where.file_name() << ":"
       << collective.where.line();
  if (collective.lanes != 0) text << " of lanes 0x" << std::hex << collective.lanes;
  return text.str();
}

std::string Place() {
  return "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) +
         "), ";
}

class Block {
 public:
  // Runs the block at blockIdx; returns whether all threads came to their end.
  bool Run(std::size_t num_threads, const std::function<void()>& thread);

  LaneValues Meet(const Collective& collective, std::uint64_t brought);

  // By a thread, which does not come back.
  void Fail(const std::string& what) {
    failure_ = Place() + "thread " + std::to_string(current_) + ": " + what;
    fibers_[current_].context.SwitchTo(scheduler_);
  }

  unsigned OwnLane() const { return static_cast<unsigned>(current_ % kLanes); }
  const std::string& failure() const { return failure_; }
  std::mt19937_64& rng() { return rng_; }

 private:
  static void RunThreads();
  void Start(Fiber& fiber);
  void ResumeAny();
  void EndWarpCollective(std::size_t first, unsigned lanes);
  void EndBlockBarrier();
  std::string WhereThreadsAre() const;

  const std::function<void()>* thread_ = nullptr;
  std::size_t num_threads_ = 0;
  std::size_t in_barrier_ = 0;
  std::size_t current_ = 0;  // the thread that runs
  std::vector<Fiber> fibers_;
  std::vector<std::size_t> ready_;
  FiberContext scheduler_;
  std::string failure_;
  std::mt19937_64 rng_;
};

Block& TheBlock() {
  static thread_local Block block;
  return block;
}

bool Block::Run(std::size_t num_threads, const std::function<void()>& thread) {
  thread_ = &thread;
  num_threads_ = num_threads;
  in_barrier_ = 0;
  failure_.clear();
  // Contexts must stay where they are once they are made.
  if (fibers_.size() < num_threads) fibers_ = std::vector<Fiber>(num_threads);
  for (std::size_t i = 0; i < num_threads; ++i) Start(fibers_[i]);
  ready_.resize(num_threads);
  std::iota(ready_.begin(), ready_.end(), 0);
  while (!ready_.empty() && failure_.empty()) ResumeAny();
  const auto has_left = [](const Fiber& fiber) { return fiber.state == State::kLeft; };
  const auto end = fibers_.begin() + static_cast<std::ptrdiff_t>(num_threads);
  if (failure_.empty() && !std::all_of(fibers_.begin(), end, has_left)) {
    failure_ = WhereThreadsAre();
  }
  return failure_.empty();
}

void Block::RunThreads() {
  Block& block = TheBlock();
  for (;;) {
    (*block.thread_)();
    Fiber& fiber = block.fibers_[block.current_];
    fiber.state = State::kLeft;
    fiber.context.SwitchTo(block.scheduler_);
  }
}

// One that a failed block has left where it waited begins anew.
void Block::Start(Fiber& fiber) {
  if (fiber.state != State::kLeft) fiber.context.Make(RunThreads);
  fiber.state = State::kReady;
}

void Block::ResumeAny() {
  std::swap(ready_[rng_() % ready_.size()], ready_.back());
  current_ = ready_.back();
  ready_.pop_back();
  threadIdx = {.x = static_cast<unsigned>(current_), .y = 0, .z = 0};
  scheduler_.SwitchTo(fibers_[current_].context);
}

LaneValues Block::Meet(const Collective& collective, std::uint64_t brought) {
  Fiber& fiber = fibers_[current_];
  fiber.state = State::kWaits;
  fiber.waits_for = collective;
  fiber.brought = brought;
  if (collective.lanes == 0) {
    ++in_barrier_;
    if (in_barrier_ == num_threads_) EndBlockBarrier();
  } else if ((collective.lanes >> OwnLane() & 1) != 0) {
    EndWarpCollective(current_ / kLanes * kLanes, collective.lanes);
  } else {
    Fail(std::string(collective.name) + " by a lane that its mask leaves out");
  }
  fiber.context.SwitchTo(scheduler_);
  return fiber.seen;
}

// Lets the lanes of a warp go on, if the last of them has come.
void Block::EndWarpCollective(std::size_t first, unsigned lanes) {
  LaneValues brought{};
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if ((lanes >> lane & 1) == 0) continue;
    if (first + lane >= num_threads_) return;
    const Fiber& fiber = fibers_[first + lane];
    if (fiber.state != State::kWaits) return;
    if (!IsSame(fiber.waits_for, fibers_[current_].waits_for)) return;
    brought[lane] = fiber.brought;
  }
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if ((lanes >> lane & 1) == 0) continue;
    fibers_[first + lane].seen = brought;
    fibers_[first + lane].state = State::kReady;
    ready_.push_back(first + lane);
  }
}

// Lets the block go on, all of whose threads have come.
void Block::EndBlockBarrier() {
  for (std::size_t i = 0; i < num_threads_; ++i) {
    if (!IsSame(fibers_[i].waits_for, fibers_[current_].waits_for)) return;
  }
  for (std::size_t i = 0; i < num_threads_; ++i) {
    fibers_[i].state = State::kReady;
    ready_.push_back(i);
  }
  in_barrier_ = 0;
}

std::string Block::WhereThreadsAre() const {
  std::map<std::string, std::pair<std::size_t, std::size_t>> places;
  for (std::size_t i = 0; i < num_threads_; ++i) {
    const auto at = places.try_emplace(TextOf(fibers_[i]), i, 0).first;
    ++at->second.second;
  }
  std::string text = Place() + "threads wait for others that do not come:";
  for (const auto& [place, threads] : places) {
    text += "\n  " + std::to_string(threads.second) + " (thread " +
            std::to_string(threads.first) + " first) " + place;
  }
  return text;
}

}  // namespace

bool RunGrid(dim3 grid, dim3 block, const std::function<void()>& thread) {
  // GPUs keep denormals, which XLA has the CPU's threads flush.
  const ScopedIeee ieee;
  gridDim = grid;
  blockDim = block;
  std::vector<unsigned> blocks(std::size_t{grid.x} * grid.y);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::ranges::shuffle(blocks, TheBlock().rng());
  for (const unsigned i : blocks) {
    blockIdx = {.x = i % grid.x, .y = i / grid.x, .z = 0};
    if (!TheBlock().Run(block.x, thread)) return false;
  }
  return true;
}

const std::string& Failure() { return TheBlock().failure(); }

void SetSeed(std::uint64_t seed) { TheBlock().rng().seed(seed); }

LaneValues Meet(const Collective& collective, std::uint64_t brought) {
  return TheBlock().Meet(collective, brought);
}

std::uint64_t ValueOf(const LaneValues& values, const Collective& collective,
                      unsigned lane) {
  if ((collective.lanes >> lane & 1) == 0) {
    TheBlock().Fail(std::string(collective.name) + " of lane " + std::to_string(lane) +
                    ", which its mask leaves out");
  }
  return values[lane];
}

unsigned OwnLane() { return TheBlock().OwnLane(); }

}  // namespace jax_ep::emulation
