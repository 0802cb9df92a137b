// Implements report.h.

#include "fabric/threads/report.h"

#include <poll.h>
#include <unistd.h>

#include <climits>
#include <cstddef>
#include <mutex>
#include <string>
#include <utility>

namespace jax_ep {
namespace {

// A pipe that can be written to takes so many bytes without waiting, unmixed with what
// other processes write.
constexpr std::size_t kMostBytes = PIPE_BUF;

struct Sink {
  std::mutex mutex;
  ReportSink sink;  // guarded by it
};

Sink& CurrentSink() {
  // Never destroyed: exchanges may still fail while the process exits.
  static auto* sink = new Sink();
  return *sink;
}

void WriteLine(std::string line) {
  if (line.size() >= kMostBytes) line.resize(kMostBytes - 1);
  line += '\n';
  pollfd can_write = {.fd = STDERR_FILENO, .events = POLLOUT, .revents = 0};
  if (poll(&can_write, 1, 0) != 1 || (can_write.revents & POLLOUT) == 0) return;
  [[maybe_unused]] const auto written = write(STDERR_FILENO, line.data(), line.size());
}

}  // namespace

void Report(const std::string& text) {
  Sink& current = CurrentSink();
  const std::scoped_lock lock(current.mutex);
  if (current.sink) {
    current.sink(text);
  } else {
    WriteLine("jax_ep " + text);
  }
}

void PrintLine(const std::string& text) {
  const std::scoped_lock lock(CurrentSink().mutex);
  WriteLine(text);
}

ReportSink SetReportSink(ReportSink sink) {
  Sink& current = CurrentSink();
  const std::scoped_lock lock(current.mutex);
  return std::exchange(current.sink, std::move(sink));
}

}  // namespace jax_ep
