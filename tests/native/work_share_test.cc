// Chunks that threads take in turns, each once.
#include "fabric/work/work_share.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "check.h"
#include "threads.h"

namespace jax_ep {
namespace {

// Counts how often each chunk of one work ran. The counts are no atomics: that nobody
// runs a chunk twice, and that whoever waits for the end sees them all, is the point.
struct Tally {
  explicit Tally(std::int64_t num_chunks)
      : runs(static_cast<std::size_t>(num_chunks)) {}
  Work AsWork() const {
    const auto run = [](const void* args, std::int64_t chunk) {
      auto& tally = *static_cast<Tally*>(const_cast<void*>(args));
      ++tally.runs[static_cast<std::size_t>(chunk)];
    };
    return {
        .args = this, .run = run, .num_chunks = static_cast<std::int64_t>(runs.size())};
  }
  std::vector<int> runs;
};

// Works of random sizes, empty ones among them.
std::vector<Tally> RandomTallies(std::mt19937_64& rng) {
  std::vector<Tally> tallies;
  const std::uint64_t count = 1 + rng() % 9;
  for (std::uint64_t i = 0; i < count; ++i) {
    tallies.emplace_back(rng() % 3 == 0 ? 0 : static_cast<std::int64_t>(rng() % 40));
  }
  return tallies;
}

std::vector<Work> WorksOf(const std::vector<Tally>& tallies) {
  std::vector<Work> works;
  for (const Tally& tally : tallies) works.push_back(tally.AsWork());
  return works;
}

void CheckRanOnce(const std::vector<Tally>& tallies) {
  for (const Tally& tally : tallies) {
    EP_CHECK_EQ(tally.runs, std::vector<int>(tally.runs.size(), 1));
  }
}

EP_TEST(EachChunkRunsOnce) {
  std::mt19937_64 rng(1);
  for (int i = 0; i < 400; ++i) {
    const std::vector<Tally> tallies = RandomTallies(rng);
    WorkShare share(WorksOf(tallies));
    std::atomic<int> ended_last = 0;
    OnThreads(1 + static_cast<std::int64_t>(rng() % 6), [&](std::int64_t) {
      if (!share.Drain()) return;
      ++ended_last;
      CheckRanOnce(tallies);
    });
    share.AwaitEnd();
    CheckRanOnce(tallies);
    EP_CHECK_EQ(ended_last.load(), share.num_chunks() == 0 ? 0 : 1);
  }
}

// A thread that took no chunk sees what all the others wrote.
EP_TEST(AwaitEndSeesAllChunks) {
  std::mt19937_64 rng(2);
  for (int i = 0; i < 200; ++i) {
    const std::vector<Tally> tallies = RandomTallies(rng);
    WorkShare share(WorksOf(tallies));
    OnThreads(4, [&](std::int64_t thread) {
      if (thread < 2) {
        share.AwaitEnd();
        CheckRanOnce(tallies);
      } else {
        share.Drain();
      }
    });
  }
}

// Ranks that read the same tokens do so at about the same time.
EP_TEST(WorksTakeTurns) {
  struct Log {
    char name;
    std::string* text;
  };
  std::string text;
  const Log logs[] = {{'a', &text}, {'b', &text}, {'c', &text}, {'d', &text}};
  const auto run = [](const void* args, std::int64_t chunk) {
    const Log& log = *static_cast<const Log*>(args);
    *log.text += log.name + std::to_string(chunk) + " ";
  };
  std::vector<Work> works;
  for (const std::int64_t num_chunks : {2, 0, 3, 1}) {
    works.push_back(
        {.args = &logs[works.size()], .run = run, .num_chunks = num_chunks});
  }
  WorkShare share(works);
  EP_CHECK(share.Drain());
  EP_CHECK_EQ(text, "a0 c0 d0 a1 c1 c2 ");
}

EP_TEST(RunTogetherNeedsNoHelper) {
  std::mt19937_64 rng(3);
  std::vector<std::function<void()>> late;
  const Schedule never = [](const std::function<void()>&) {};
  const Schedule at_once = [](const std::function<void()>& task) { task(); };
  const Schedule afterwards = [&](std::function<void()> task) {
    late.push_back(std::move(task));
  };
  for (int i = 0; i < 50; ++i) {
    for (const Schedule& schedule : {never, at_once, afterwards}) {
      const std::vector<Tally> tallies = RandomTallies(rng);
      RunTogether(WorksOf(tallies), schedule);
      CheckRanOnce(tallies);
    }
  }
  // The tallies are gone: what comes too late must not touch them.
  for (const auto& task : late) task();
}

EP_TEST(RunTogetherWaitsForItsHelpers) {
  std::mt19937_64 rng(4);
  HelperThreads helpers;
  for (int i = 0; i < 1000; ++i) {
    const std::vector<Tally> tallies = RandomTallies(rng);
    RunTogether(WorksOf(tallies), helpers.schedule());
    CheckRanOnce(tallies);
  }
}

#if defined(__SSE2__)
std::uint64_t Control() { return _mm_getcsr() & 0xffc0U; }
void FlushDenormals() { _mm_setcsr(_mm_getcsr() | 0x8040U); }
#else
std::uint64_t Control() {
  std::uint64_t value;
  asm volatile("mrs %0, fpcr" : "=r"(value));
  return value;
}
void FlushDenormals() { asm volatile("msr fpcr, %0" : : "r"(Control() | (1U << 24))); }
#endif

EP_TEST(ChunksSeeDenormalsWhereTheCallerFlushesThem) {
  volatile float smallest = std::numeric_limits<float>::min();
  const auto halve = [](const void* args, std::int64_t) {
    auto& value = *static_cast<volatile float*>(const_cast<void*>(args));
    value = value / 2;
  };
  const Work work = {
      .args = const_cast<const float*>(&smallest), .run = halve, .num_chunks = 2};
  OnThreads(1, [&](std::int64_t) {
    FlushDenormals();
    const std::uint64_t before = Control();
    volatile float flushed = std::numeric_limits<float>::min();
    flushed = flushed / 2;
    EP_CHECK_EQ(static_cast<float>(flushed), 0);
    RunTogether({work}, [](const std::function<void()>&) {});
    EP_CHECK_EQ(Control(), before);
  });
  EP_CHECK_EQ(static_cast<float>(smallest), std::numeric_limits<float>::min() / 4);
}

}  // namespace
}  // namespace jax_ep
