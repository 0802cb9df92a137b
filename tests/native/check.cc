// Implements check.h: runs the tests whose names are asked for.
#include "check.h"

#include <chrono>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "fabric/threads/report.h"

namespace jax_ep {
namespace {

// A broken kernel fails in every element: the first few say enough.
constexpr int kShownFailures = 5;

struct Named {
  const char* name;
  void (*run)();
};

std::vector<Named>& Tests() {
  static std::vector<Named> tests;
  return tests;
}

std::mutex failures_mutex;
int failures = 0;  // of the running test
thread_local std::string current_case;

bool Passes(const Named& test) {
  failures = 0;
  const auto start = std::chrono::steady_clock::now();
  test.run();
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  std::printf("%s %s (%.2f s)\n", failures == 0 ? "passed" : "FAILED", test.name,
              took.count());
  if (failures > 0) std::printf("  %d failures\n", failures);
  return failures == 0;
}

}  // namespace

Test::Test(const char* name, void (*run)()) { Tests().push_back({name, run}); }

Case::Case(std::string text) : outer_(std::exchange(current_case, std::move(text))) {}

Case::~Case() { current_case = std::move(outer_); }

void NoteFailure(const char* file, int line, const std::string& what) {
  const std::scoped_lock lock(failures_mutex);
  if (++failures > kShownFailures) return;
  std::printf("%s:%d: %s\n", file, line, what.c_str());
  if (!current_case.empty()) std::printf("  in %s\n", current_case.c_str());
  std::fflush(stdout);
}

}  // namespace jax_ep

// Runs the tests whose names contain the first argument, or all of them.
int main(int argc, char** argv) {
  const char* wanted = argc > 1 ? argv[1] : "";
  // Exchanges that fail on purpose would fill the output.
  jax_ep::SetReportSink([](const std::string&) {});
  int ran = 0;
  int failed = 0;
  for (const auto& test : jax_ep::Tests()) {
    if (std::strstr(test.name, wanted) == nullptr) continue;
    ++ran;
    failed += jax_ep::Passes(test) ? 0 : 1;
    std::fflush(stdout);
  }
  std::printf("%d of %d tests failed\n", failed, ran);
  return failed == 0 && ran > 0 ? 0 : 1;
}
