// Implements threads.h.
#include "threads.h"

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

namespace jax_ep {

void OnThreads(std::int64_t count, const std::function<void(std::int64_t)>& body) {
  std::vector<std::thread> threads;
  for (std::int64_t i = 0; i < count; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

void Dawdle(std::mt19937_64& rng) {
  const std::uint64_t kind = rng() % 8;
  if (kind >= 4) return;
  if (kind >= 1) return std::this_thread::yield();
  std::this_thread::sleep_for(std::chrono::microseconds(rng() % 300));
}

HelperThreads::HelperThreads(std::int64_t num_threads) {
  for (std::int64_t i = 0; i < num_threads; ++i) {
    threads_.emplace_back([this, i] { Run(static_cast<std::uint64_t>(i)); });
  }
}

HelperThreads::~HelperThreads() {
  {
    const std::scoped_lock lock(mutex_);
    ending_ = true;
  }
  changed_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

Schedule HelperThreads::schedule() {
  return [this](std::function<void()> task) { Add(std::move(task)); };
}

std::int64_t HelperThreads::num_scheduled() {
  const std::scoped_lock lock(mutex_);
  return num_scheduled_;
}

void HelperThreads::Add(std::function<void()> task) {
  {
    const std::scoped_lock lock(mutex_);
    tasks_.push_back(std::move(task));
    ++num_scheduled_;
  }
  changed_.notify_one();
}

void HelperThreads::Run(std::uint64_t seed) {
  std::mt19937_64 rng(seed);
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return ending_ || !tasks_.empty(); });
    if (tasks_.empty()) return;
    std::swap(tasks_[rng() % tasks_.size()], tasks_.back());
    const std::function<void()> task = std::move(tasks_.back());
    tasks_.pop_back();
    lock.unlock();
    Dawdle(rng);
    task();
    lock.lock();
  }
}

}  // namespace jax_ep
