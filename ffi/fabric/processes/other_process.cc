// Implements other_process.h.

#include "fabric/processes/other_process.h"

#include <poll.h>
#include <unistd.h>

#if defined(__linux__)
#include <sys/syscall.h>
#endif

#include <cerrno>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <variant>

namespace jax_ep {

std::variant<std::unique_ptr<OtherProcess>, std::string> OtherProcess::Open(
    std::int32_t index, BoardAddress address) {
  std::unique_ptr<OtherProcess> other(new OtherProcess(index, address.process));
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

OtherProcess::~OtherProcess() {
  if (handle_ >= 0) close(handle_);
}

std::string OtherProcess::name() const {
  return "process " + std::to_string(index_) + " (pid " + std::to_string(process_) +
         ")";
}

// Its handle becomes readable when it ends. Where there are no such handles, only the
// time-out tells.
bool OtherProcess::alive() const {
  if (handle_ < 0) return true;
  pollfd poll_for = {.fd = handle_, .events = POLLIN, .revents = 0};
  return poll(&poll_for, 1, 0) <= 0;
}

}  // namespace jax_ep
