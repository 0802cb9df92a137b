// Implements stream_times.h.

#include "fabric/gpus/stream_times.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace jax_ep {
namespace {

std::atomic<std::uint64_t> next{0};

// Every GPU may write there, by the host's addresses. Never freed, as some still might.
StreamTimes* AllTimes() {
  static auto* times = []() -> StreamTimes* {
    constexpr std::size_t kBytes = kMaxStreamTimes * sizeof(StreamTimes);
    void* memory = nullptr;
    constexpr unsigned kFlags = cudaHostAllocPortable | cudaHostAllocMapped;
    if (cudaHostAlloc(&memory, kBytes, kFlags) != cudaSuccess) return nullptr;
    std::memset(memory, 0, kBytes);
    return static_cast<StreamTimes*>(memory);
  }();
  return times;
}

// Words are stored with release and loaded with acquire: who sees a word of later times
// sees their number afterwards.
void Store(std::int64_t& word, std::int64_t value) {
  std::atomic_ref(word).store(value, std::memory_order_release);
}

std::int64_t Load(std::int64_t& word) {
  return std::atomic_ref(word).load(std::memory_order_acquire);
}

// Returns whether times of this number are there and whole.
bool Copy(StreamTimes& from, std::int64_t number, StreamTimes& to) {
  if (Load(from.number) != number) return false;
  to.number = number;
  // The last one first, as it says that all others are there.
  for (auto word : {&StreamTimes::told, &StreamTimes::ended, &StreamTimes::began,
                    &StreamTimes::came, &StreamTimes::exchange, &StreamTimes::rank,
                    &StreamTimes::device}) {
    to.*word = Load(from.*word);
  }
  return to.told != 0 && Load(from.number) == number;
}

}  // namespace

StreamTimes* ClaimStreamTimes() {
  StreamTimes* all = AllTimes();
  if (all == nullptr) return nullptr;
  const std::uint64_t number = next.fetch_add(1, std::memory_order_acq_rel);
  StreamTimes& times = all[number % kMaxStreamTimes];
  Store(times.number, static_cast<std::int64_t>(number));
  for (auto word : {&StreamTimes::told, &StreamTimes::ended, &StreamTimes::began,
                    &StreamTimes::came}) {
    Store(times.*word, 0);
  }
  return &times;
}

std::uint64_t NumStreamTimes() { return next.load(std::memory_order_acquire); }

std::size_t ReadStreamTimes(std::uint64_t from, std::span<StreamTimes> room) {
  std::size_t count = 0;
  for (std::uint64_t number = from; number < from + room.size(); ++number) {
    if (number >= NumStreamTimes()) break;
    StreamTimes& times = AllTimes()[number % kMaxStreamTimes];
    if (Copy(times, static_cast<std::int64_t>(number), room[count])) ++count;
  }
  return count;
}

void TimedStream::Belong(const Owner& owner) {
  if (owner.exchange == kNotRecorded) times_ = nullptr;
  if (times_ == nullptr) return;
  Store(times_->exchange, owner.exchange);
  Store(times_->rank, owner.rank);
  Store(times_->device, owner.device);
}

void TimedStream::Note(std::int64_t StreamTimes::* which) {
  if (times_ == nullptr) return;
  if (stamp_(&(times_->*which), stream_) != cudaSuccess) times_ = nullptr;
}

}  // namespace jax_ep
