// Implements crew.h.

#include "fabric/work/crew.h"

#include <functional>
#include <mutex>
#include <thread>
#include <utility>

namespace jax_ep {

Crew::~Crew() {
  {
    const std::scoped_lock lock(mutex_);
    stopping_ = true;
  }
  wanted_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Crew::Schedule(std::function<void()> task) {
  const std::scoped_lock lock(mutex_);
  tasks_.push_back(std::move(task));
  if (tasks_.size() > num_idle_) threads_.emplace_back([this] { Serve(); });
  wanted_.notify_one();
}

void Crew::Serve() {
  std::unique_lock lock(mutex_);
  for (;;) {
    ++num_idle_;
    wanted_.wait(lock, [this] { return stopping_ || !tasks_.empty(); });
    --num_idle_;
    if (tasks_.empty()) return;
    {
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
    }
    lock.lock();
  }
}

}  // namespace jax_ep
