// The ring of records: what is read is whole and in order, and nobody waits.
#include "fabric/threads/recorder.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "check.h"
#include "threads.h"

namespace jax_ep {
namespace {

// A record of which every number is the same, so that a torn one shows.
CallRecord RecordOf(std::int64_t number) {
  CallRecord record = {};
  record.exchange = number;
  record.run = number;
  record.told = number;
  record.came.fill(number);
  return record;
}

bool IsWhole(const CallRecord& record) {
  if (record.run != record.exchange || record.told != record.exchange) return false;
  for (const std::int64_t came : record.came) {
    if (came != record.exchange) return false;
  }
  return true;
}

std::vector<CallRecord> AllOf(const Recorder& recorder, std::uint64_t from = 0) {
  std::vector<CallRecord> records(recorder.count() - from);
  records.resize(recorder.Read(from, records));
  return records;
}

std::vector<std::int64_t> NumbersOf(const std::vector<CallRecord>& records) {
  std::vector<std::int64_t> numbers;
  numbers.reserve(records.size());
  for (const CallRecord& record : records) {
    EP_CHECK(IsWhole(record));
    numbers.push_back(record.exchange);
  }
  return numbers;
}

EP_TEST(SwitchTellsWhatItWas) {
  EP_CHECK(!SetRecordsCalls(true));
  EP_CHECK(RecordsCalls());
  EP_CHECK(SetRecordsCalls(false));
  EP_CHECK(!RecordsCalls());
}

EP_TEST(RecordsAreReadInOrder) {
  Recorder recorder(8);
  EP_CHECK(AllOf(recorder).empty());
  for (std::int64_t number = 0; number < 5; ++number) {
    recorder.Write(RecordOf(number));
  }
  EP_CHECK_EQ(Show(NumbersOf(AllOf(recorder))), "[0, 1, 2, 3, 4]");
  EP_CHECK_EQ(Show(NumbersOf(AllOf(recorder, 3))), "[3, 4]");
}

EP_TEST(TheOldestGiveWay) {
  Recorder recorder(4);
  for (std::int64_t number = 0; number < 10; ++number) {
    recorder.Write(RecordOf(number));
  }
  EP_CHECK_EQ(recorder.count(), 10);
  EP_CHECK_EQ(Show(NumbersOf(AllOf(recorder))), "[6, 7, 8, 9]");
}

// Writers go over each other's places all the time, and readers read meanwhile.
EP_TEST(NoRecordIsTorn) {
  constexpr std::int64_t kWriters = 3;
  constexpr std::int64_t kRecords = 40000;
  Recorder recorder(4);
  std::atomic<std::int64_t> writing{kWriters};
  OnThreads(kWriters + 1, [&](std::int64_t thread) {
    if (thread == kWriters) {
      std::vector<CallRecord> room(4);
      while (writing.load() > 0) {
        const std::uint64_t count = recorder.count();
        const std::size_t read = recorder.Read(count < 4 ? 0 : count - 4, room);
        for (std::size_t i = 0; i < read; ++i) EP_CHECK(IsWhole(room[i]));
      }
      return;
    }
    for (std::int64_t i = 0; i < kRecords; ++i) {
      recorder.Write(RecordOf(thread * kRecords + i));
    }
    writing.fetch_sub(1);
  });
  EP_CHECK_EQ(recorder.count(), kWriters * kRecords);
  // Nobody is left who could hold a place.
  for (std::int64_t number = 0; number < 4; ++number) recorder.Write(RecordOf(number));
  EP_CHECK_EQ(Show(NumbersOf(AllOf(recorder, kWriters * kRecords))), "[0, 1, 2, 3]");
}

}  // namespace
}  // namespace jax_ep
