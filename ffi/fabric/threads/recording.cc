// Implements recording.h.

#include "fabric/threads/recording.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace jax_ep {
namespace {

std::int64_t NewExchange() {
  static std::atomic<std::int64_t> next{0};
  return next.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace

Recording::Recording(const Attendance& first, std::size_t num_told)
    : span_(first.span),
      came_(static_cast<std::size_t>(first.num_ranks)),
      num_left_(num_told) {
  record_.exchange = NewExchange();
  record_.op = first.print.op;
  record_.scope = first.scope;
  record_.fabric = first.fabric;
  record_.run = first.key.run_id;
  record_.call_site = first.key.call_site;
  record_.group = span_ == nullptr ? first.key.group : span_->group;
  record_.num_ranks = first.num_ranks;
  for (const Lent& lent : first.lent) record_.lent_bytes += lent.shared_bytes;
}

void Recording::NoteArrival(std::int32_t rank, std::int64_t when) {
  if (when == 0) is_whole_.store(false, std::memory_order_relaxed);
  came_[static_cast<std::size_t>(rank)] = when;
}

void Recording::NoteEpoch(std::uint64_t epoch, std::int64_t named) {
  record_.epoch = static_cast<std::int64_t>(epoch);
  record_.named = named;
}

void Recording::NotePublished() { record_.published = SteadyNow(); }

void Recording::NoteSeen(std::int32_t process) {
  const std::int64_t now = SteadyNow();
  for (std::size_t rank = 0; rank < came_.size(); ++rank) {
    if (span_->process_of[rank] == process) came_[rank] = now;
  }
}

void Recording::NoteBeginning() { record_.began = SteadyNow(); }

void Recording::NoteEnd() { record_.ended = SteadyNow(); }

void Recording::NoteTold(bool has_failed) {
  if (has_failed) is_whole_.store(false, std::memory_order_relaxed);
  if (num_left_.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  record_.told = SteadyNow();
  if (is_whole_.load(std::memory_order_relaxed)) Write();
}

void Recording::Write() {
  for (std::size_t first = 0; first < came_.size(); first += kRecordedRanks) {
    record_.first_rank = static_cast<std::int64_t>(first);
    record_.is_here = 0;
    const std::size_t count = std::min(kRecordedRanks, came_.size() - first);
    for (std::size_t i = 0; i < count; ++i) {
      const auto rank = static_cast<std::int64_t>(first + i);
      const bool is_here = span_ == nullptr || span_->IsHere(rank);
      record_.is_here |= static_cast<std::uint64_t>(is_here) << i;
      record_.came[i] = came_[first + i];
    }
    ProcessRecorder().Write(record_);
  }
}

Done Noted(std::shared_ptr<Recording> recording, Done done) {
  return [recording = std::move(recording),
          done = std::move(done)](const std::optional<std::string>& failure) {
    recording->NoteTold(failure.has_value());
    done(failure);
  };
}

}  // namespace jax_ep
