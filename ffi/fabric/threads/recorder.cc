// Implements recorder.h.

#include "fabric/threads/recorder.h"

#include <array>
#include <atomic>
#include <bit>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace jax_ep {
namespace {

// 20 MB, of which a program that records little touches little: 32 Ki exchanges of up
// to 64 ranks, those of some 70 steps of 64 layers.
constexpr std::size_t kCapacity = 1 << 15;

}  // namespace

std::int64_t SteadyNow() {
  return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

Recorder::Recorder(std::size_t capacity)
    : capacity_(capacity), slots_(std::make_unique<Slot[]>(capacity)) {}

void Recorder::Write(const CallRecord& record) {
  const std::uint64_t number = next_.fetch_add(1, std::memory_order_acq_rel);
  Slot& slot = SlotOf(number);
  const std::uint64_t writing = 2 * number + 1;
  std::uint64_t stamp = slot.stamp.load(std::memory_order_relaxed);
  // Whoever is a turn late, or finds one who is, leaves the place to the other.
  if (stamp % 2 == 1 || stamp > writing) return;
  if (!slot.stamp.compare_exchange_strong(stamp, writing, std::memory_order_acq_rel,
                                          std::memory_order_relaxed)) {
    return;
  }
  const auto words = std::bit_cast<std::array<std::uint64_t, kWords>>(record);
  for (std::size_t i = 0; i < kWords; ++i) {
    slot.words[i].store(words[i], std::memory_order_release);
  }
  slot.stamp.store(writing + 1, std::memory_order_release);
}

std::size_t Recorder::Read(std::uint64_t from, std::span<CallRecord> room) const {
  std::size_t count = 0;
  for (std::uint64_t number = from; number < from + room.size(); ++number) {
    const Slot& slot = SlotOf(number);
    const std::uint64_t written = 2 * number + 2;
    if (slot.stamp.load(std::memory_order_acquire) != written) continue;
    std::array<std::uint64_t, kWords> words{};
    for (std::size_t i = 0; i < kWords; ++i) {
      words[i] = slot.words[i].load(std::memory_order_acquire);
    }
    if (slot.stamp.load(std::memory_order_relaxed) != written) continue;
    room[count++] = std::bit_cast<CallRecord>(words);
  }
  return count;
}

Recorder& ProcessRecorder() {
  // Never destroyed: exchanges may still end while the process exits.
  static auto* recorder = new Recorder(kCapacity);
  return *recorder;
}

}  // namespace jax_ep
