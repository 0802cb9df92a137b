// Where in a process's window its ranks' buffers lie.
#include "fabric/processes/window.h"

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"

namespace jax_ep {
namespace {

// Marks every byte of every rank's buffers in a half: all lie in it and none overlap.
void CheckHolds(const std::vector<std::int64_t>& sizes, std::size_t num_ranks) {
  const Case which("buffers of " + Show(sizes) + " bytes of " + Show(num_ranks) +
                   " ranks");
  const HalfLayout layout(sizes);
  std::vector<int> half(layout.BytesOf(num_ranks));
  EP_CHECK(!half.empty());
  for (std::size_t rank = 0; rank < num_ranks; ++rank) {
    for (std::size_t lent = 0; lent < sizes.size(); ++lent) {
      int* place = layout.Place(half.data(), rank, lent);
      if (sizes[lent] == 0) {
        EP_CHECK(place == nullptr);
        continue;
      }
      const std::ptrdiff_t begin = place - half.data();
      EP_CHECK_EQ(begin % static_cast<std::ptrdiff_t>(HalfLayout::kAlignment), 0);
      for (std::int64_t i = begin; i < begin + sizes[lent]; ++i) {
        ++half.at(static_cast<std::size_t>(i));
      }
    }
  }
  for (const int times : half) EP_CHECK(times <= 1);
}

EP_TEST(BuffersOfAllRanksHaveTheirOwnPlaces) {
  for (const std::size_t num_ranks : {1U, 2U, 7U}) {
    CheckHolds({}, num_ranks);
    CheckHolds({0}, num_ranks);
    CheckHolds({0, 0, 0}, num_ranks);
    CheckHolds({1}, num_ranks);
    CheckHolds({64, 64}, num_ranks);
    CheckHolds({63, 65, 1}, num_ranks);
    CheckHolds({0, 1000, 0, 3, 128, 0, 77}, num_ranks);
    CheckHolds(std::vector<std::int64_t>(100, 5), num_ranks);
  }
}

// The readers compute it for themselves, from what they know of the others.
EP_TEST(LayoutIsAsWritten) {
  const HalfLayout layout({100, 0, 64, 1});
  EP_CHECK_EQ(layout.BytesOf(3), 3 * (128 + 64 + 64));
  const auto* half = reinterpret_cast<const char*>(std::uintptr_t{4096});
  EP_CHECK_EQ(layout.Place(half, 0, 0) - half, 0);
  EP_CHECK_EQ(layout.Place(half, 0, 2) - half, 128);
  EP_CHECK_EQ(layout.Place(half, 0, 3) - half, 192);
  EP_CHECK_EQ(layout.Place(half, 2, 2) - half, 2 * 256 + 128);
}

// Products of sizes beyond 32 bits.
EP_TEST(HalvesMayBeLarge) {
  constexpr std::int64_t kLarge = std::int64_t{3} * std::numeric_limits<int>::max();
  const HalfLayout layout({kLarge, 64});
  EP_CHECK(layout.BytesOf(8) > static_cast<std::size_t>(8 * kLarge));
}

}  // namespace
}  // namespace jax_ep
