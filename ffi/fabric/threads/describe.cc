// Implements describe.h.

#include "fabric/threads/describe.h"

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <numeric>
#include <string>
#include <vector>

namespace jax_ep {
namespace {

// Of two calls with the same print: how their lent buffers differ.
std::string DescribeLent(const LentSum& one, const LentSum& other) {
  if (one.num_buffers != other.num_buffers) {
    return "; a rank lends " + std::to_string(one.num_buffers) +
           " buffers in the one and " + std::to_string(other.num_buffers) +
           " in the other";
  }
  if (one.shared_bytes != other.shared_bytes) {
    return "; a rank publishes " + std::to_string(one.shared_bytes) +
           " bytes in the one and " + std::to_string(other.shared_bytes) +
           " bytes in the other";
  }
  return "; a rank publishes " + std::to_string(one.shared_bytes) +
         " bytes in both, but not the same of each buffer";
}

}  // namespace

std::string RankList(const std::vector<std::int32_t>& ranks) {
  std::string text = ranks.size() == 1 ? "rank" : "ranks";
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    text += (i == 0 ? " " : ", ") + std::to_string(ranks[i]);
  }
  return text;
}

std::string Seconds(std::chrono::duration<double> duration) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.1f s", duration.count());
  return text.data();
}

std::string Describe(const CallPrint& print) {
  return std::string(print.op) + " of [" + std::to_string(print.rows) + " rows, " +
         std::to_string(print.row_bytes) + " bytes] with plan fingerprint " +
         std::to_string(print.plan);
}

LentSum SumOf(const std::vector<std::int64_t>& shared_bytes) {
  return {.num_buffers = static_cast<std::int64_t>(shared_bytes.size()),
          .shared_bytes = std::accumulate(shared_bytes.begin(), shared_bytes.end(),
                                          std::int64_t{0})};
}

std::string DescribeMismatch(const Caller& one, const Caller& other) {
  return one.who + " called " + Describe(one.print) + " and " + other.who + " called " +
         Describe(other.print) +
         (one.print == other.print ? DescribeLent(one.lent, other.lent) : "");
}

}  // namespace jax_ep
