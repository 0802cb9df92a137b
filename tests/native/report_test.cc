// Lines on stderr, whole and without waiting for whoever reads them.
#include "fabric/threads/report.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>

#include "captured_reports.h"
#include "check.h"
#include "stderr_pipe.h"
#include "threads.h"

namespace jax_ep {
namespace {

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
