// Puts a pipe in the place of stderr, for tests of what is written there.

#ifndef JAX_EP_TESTS_NATIVE_STDERR_PIPE_H_
#define JAX_EP_TESTS_NATIVE_STDERR_PIPE_H_

#include <fcntl.h>
#include <sys/types.h>
#include <unistd.h>

#include <array>
#include <cstddef>
#include <string>

#include "check.h"
#include "fabric/threads/report.h"

namespace jax_ep {

// Puts a pipe in place of stderr while it lives.
class StderrPipe {
 public:
  StderrPipe() : stderr_(dup(STDERR_FILENO)), sink_(SetReportSink(nullptr)) {
    std::array<int, 2> ends{};
    EP_CHECK_EQ(pipe(ends.data()), 0);
    from_ = ends[0];
    dup2(ends[1], STDERR_FILENO);
    close(ends[1]);
  }
  ~StderrPipe() {
    Restore();
    close(from_);
    SetReportSink(sink_);
  }
  StderrPipe(const StderrPipe&) = delete;
  StderrPipe& operator=(const StderrPipe&) = delete;

  // Takes as much as it can hold; returns how much that is.
  static std::size_t Fill() {
    const int flags = fcntl(STDERR_FILENO, F_GETFL);
    fcntl(STDERR_FILENO, F_SETFL, flags | O_NONBLOCK);
    std::size_t bytes = 0;
    while (write(STDERR_FILENO, "x", 1) == 1) ++bytes;
    fcntl(STDERR_FILENO, F_SETFL, flags);
    return bytes;
  }

  // Returns all that was written, after which nothing more is.
  std::string Read() {
    Restore();
    std::string text;
    std::array<char, 1024> part{};
    for (;;) {
      const ssize_t got = read(from_, part.data(), part.size());
      if (got <= 0) return text;
      text.append(part.data(), static_cast<std::size_t>(got));
    }
  }

 private:
  void Restore() {
    if (stderr_ < 0) return;
    dup2(stderr_, STDERR_FILENO);
    close(stderr_);
    stderr_ = -1;
  }

  int stderr_;
  ReportSink sink_;
  int from_ = -1;
};

}  // namespace jax_ep

#endif  // JAX_EP_TESTS_NATIVE_STDERR_PIPE_H_
