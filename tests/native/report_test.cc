#include "fabric/threads/report.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>

#include "captured_reports.h"
#include "check.h"
#include "threads.h"

namespace jax_ep {
namespace {

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

EP_TEST(ReportIsALineOnStderr) {
  StderrPipe pipe;
  Report("dispatch: rank 1 of 2 gave up");
  EP_CHECK_EQ(pipe.Read(), "jax_ep dispatch: rank 1 of 2 gave up\n");
}

EP_TEST(LongReportsAreCut) {
  StderrPipe pipe;
  Report(std::string(100'000, 'r'));
  const std::string text = pipe.Read();
  EP_CHECK_EQ(text.size(), 4096);
  EP_CHECK_EQ(text.substr(0, 8), "jax_ep r");
  EP_CHECK_EQ(text.back(), '\n');
}

EP_TEST(LinesOfThreadsAreNotMixed) {
  StderrPipe pipe;
  constexpr std::int64_t kThreads = 4;
  constexpr std::size_t kLines = 20;
  OnThreads(kThreads, [&](std::int64_t thread) {
    const std::string text(200, static_cast<char>('a' + thread));
    for (std::size_t i = 0; i < kLines; ++i) Report(text);
  });
  const std::string text = pipe.Read();
  EP_CHECK_EQ(text.size(), kThreads * kLines * 208);
  for (std::size_t at = 0; at + 208 <= text.size(); at += 208) {
    const std::string line = text.substr(at + 7, 200);
    EP_CHECK_EQ(text.substr(at, 7), "jax_ep ");
    EP_CHECK_EQ(std::ranges::count(line, line[0]), 200);
    EP_CHECK_EQ(text[at + 207], '\n');
  }
}

// Nobody waits for who does not read: a failure must be told to those it is of.
EP_TEST(ReportDoesNotWaitForAReader) {
  StderrPipe pipe;
  const std::size_t full = StderrPipe::Fill();
  const auto start = std::chrono::steady_clock::now();
  Report("dispatch: nobody reads this");
  EP_CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(10));
  EP_CHECK_EQ(pipe.Read().size(), full);
}

EP_TEST(SinkTakesReportsUntilItGoes) {
  StderrPipe pipe;
  {
    const CapturedReports reports;
    Report("one");
    EP_CHECK_EQ(Show(reports.texts()), "[one]");
  }
  Report("two");
  EP_CHECK_EQ(pipe.Read(), "jax_ep two\n");
}

}  // namespace
}  // namespace jax_ep
