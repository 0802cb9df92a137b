// What is copied for other processes: these rows and nothing else.
#include "cpu/publish_rows.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "check.h"
#include "run_work.h"

namespace jax_ep {
namespace {

using Ranges = std::vector<std::pair<std::int64_t, std::int64_t>>;

constexpr char kUntouched = 'U';

char Payload(std::int64_t row, std::int64_t i) {
  return static_cast<char>((row * 131 + i * 7 + i / 256) % 251);
}

// Buffers of exactly their size, so that AddressSanitizer sees what lies beside them.
struct Publication {
  Publication(std::int64_t rows, std::int64_t bytes)
      : num_rows(rows), row_bytes(bytes) {
    for (std::int64_t row = 0; row < num_rows; ++row) {
      for (std::int64_t i = 0; i < row_bytes; ++i) from.push_back(Payload(row, i));
    }
    to.assign(from.size(), kUntouched);
    for (std::vector<char>* buffer : {&from, &to}) {
      buffer->shrink_to_fit();
      buffer->reserve(1);  // A copy of no bytes wants an address, too.
    }
  }

  cpu::PublishRowsArgs Args(const std::vector<std::int32_t>* rows,
                            const Ranges& ranges) {
    return {.from = from.data(),
            .to = to.data(),
            .rows = rows == nullptr ? nullptr : rows->data(),
            .ranges = ranges,
            .num_rows = num_rows,
            .row_bytes = row_bytes};
  }

  // Runs the work in some orders and checks each time that these rows were copied, to
  // where they were, and nothing else was written.
  void CheckPublishes(const cpu::PublishRowsArgs& args,
                      const std::vector<bool>& is_copied) {
    std::mt19937_64 rng(static_cast<std::uint64_t>(num_rows));
    for (const bool at_once : {false, false, true}) {
      const Case which(Show(num_rows) + " rows of " + Show(row_bytes) + " bytes");
      std::ranges::fill(to, kUntouched);
      const Work work = cpu::PublishRowsWork(args);
      if (at_once) {
        RunAtOnce(work);
      } else {
        RunShuffled(work, rng);
      }
      for (std::int64_t row = 0; row < num_rows; ++row) CheckRow(row, is_copied);
    }
  }

  void CheckRow(std::int64_t row, const std::vector<bool>& is_copied) {
    const bool copied = is_copied[static_cast<std::size_t>(row)];
    for (std::int64_t i = 0; i < row_bytes; ++i) {
      const char got = to[static_cast<std::size_t>(row * row_bytes + i)];
      if (got == (copied ? Payload(row, i) : kUntouched)) continue;
      const Case which("row " + Show(row) + " of " + Show(num_rows) + ", byte " +
                       Show(i) + " of " + Show(row_bytes));
      EP_CHECK_EQ(got, copied ? Payload(row, i) : kUntouched);
    }
  }

  std::int64_t num_rows;
  std::int64_t row_bytes;
  std::vector<char> from;
  std::vector<char> to;
};

void CheckAll(std::int64_t num_rows, std::int64_t row_bytes) {
  Publication publication(num_rows, row_bytes);
  publication.CheckPublishes(
      publication.Args(nullptr, {{0, num_rows}}),
      std::vector<bool>(static_cast<std::size_t>(num_rows), true));
}

EP_TEST(AllRowsOfAnySize) {
  for (const std::int64_t row_bytes :
       {1, 2, 3, 7, 8, 31, 32, 33, 63, 64, 65, 127, 129, 1000, 4099}) {
    for (const std::int64_t num_rows : {1, 2, 5, 40}) {
      CheckAll(num_rows, row_bytes);
    }
  }
}

EP_TEST(ManyChunks) {
  CheckAll(200, 4099);
  CheckAll(150000, 3);
  CheckAll(3, 300001);
}

EP_TEST(NothingToPublish) {
  CheckAll(0, 8);
  CheckAll(5, 0);
  Publication publication(3, 8);
  publication.CheckPublishes(publication.Args(nullptr, {}),
                             std::vector<bool>(3, false));
}

// A list of rows, of which others pull some ranges of entries.
void CheckListed(std::int64_t num_rows, std::int64_t row_bytes, std::uint64_t seed) {
  std::mt19937_64 rng(seed);
  std::vector<std::int32_t> rows(static_cast<std::size_t>(num_rows));
  std::iota(rows.begin(), rows.end(), 0);
  std::ranges::shuffle(rows, rng);
  // Of exactly the entries there are: not every row is listed.
  rows.resize(rows.size() - rows.size() / 4);
  rows.shrink_to_fit();
  Ranges ranges;
  std::vector<bool> is_copied(static_cast<std::size_t>(num_rows), false);
  for (std::size_t begin = 0; begin < rows.size();) {
    const std::size_t end = std::min(rows.size(), begin + 1 + rng() % 50);
    if (rng() % 2 == 0) {
      ranges.emplace_back(begin, end);
      for (std::size_t i = begin; i < end; ++i) {
        is_copied[static_cast<std::size_t>(rows[i])] = true;
      }
    }
    if (rng() % 5 == 0) ranges.emplace_back(end, end);  // of nothing
    begin = end;
  }
  Publication publication(num_rows, row_bytes);
  publication.CheckPublishes(publication.Args(&rows, ranges), is_copied);
}

EP_TEST(ListedRowsInRanges) {
  for (const std::int64_t row_bytes : {1, 3, 64, 77, 2048}) {
    for (std::uint64_t seed = 0; seed < 12; ++seed) CheckListed(150, row_bytes, seed);
  }
  CheckListed(300, 4001, 1);
  CheckListed(120000, 5, 2);
}

}  // namespace
}  // namespace jax_ep
