// What the kernels that pull rows, and publishing, make of plans that hold anything.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "bad_plan.h"
#include "check.h"
#include "common/dropped.h"
#include "cpu/plan_fault.h"
#include "cpu/publish_rows.h"
#include "cpu/reduce_rows.h"
#include "cpu/row_dots.h"
#include "numbers.h"
#include "run_work.h"
#include "token_rows.h"

namespace jax_ep {
namespace {

using Numbers32 = std::vector<std::int32_t>;

// Tokens that pull rows by a plan that a test may spoil.
struct Pulling {
  explicit Pulling(std::mt19937_64& rng, std::int64_t hidden = 5)
      : tokens({.num_ranks = 3,
                .num_local_experts = 2,
                .num_tokens = 6,
                .num_topk = 4,
                .capacity = 18},
               Routing::kUniform, DType::kF32, hidden, rng),
        weights(DType::kF32, tokens.geometry.choices_per_rank()),
        dout(DType::kF32, tokens.geometry.num_tokens * hidden) {
    weights.FillRandomly(rng);
    dout.FillRandomly(rng);
  }

  // What ReduceRows or RowDots, which have these arguments in common, are given.
  template <typename Args>
  Args Common(cpu::PlanFault* fault) const {
    Args args = {};
    args.rows = PeerTable(tokens.table.data());
    args.send_rank = tokens.send_rank.data();
    args.send_row = tokens.send_row.data();
    args.num_ranks = tokens.geometry.num_ranks;
    args.num_tokens = tokens.geometry.num_tokens;
    args.num_topk = tokens.geometry.num_topk;
    args.capacity = tokens.geometry.capacity;
    args.hidden = tokens.hidden;
    args.dtype = DType::kF32;
    args.fault = fault;
    return args;
  }

  // The sums of all tokens, and behind them the products of all choices.
  std::vector<float> Run(cpu::PlanFault* fault, std::mt19937_64& rng) const {
    std::vector<float> out(static_cast<std::size_t>(dout.size()), 7);
    auto reduce = Common<ReduceRowsArgs>(fault);
    reduce.weights = static_cast<const float*>(weights.at(0));
    reduce.out = out.data();
    RunShuffled(cpu::ReduceRowsWork(reduce), rng);
    std::vector<float> dots(tokens.send_row.size(), 7);
    auto multiply = Common<RowDotsArgs>(fault);
    multiply.dout = dout.at(0);
    multiply.dots = dots.data();
    RunShuffled(cpu::RowDotsWork(multiply), rng);
    out.insert(out.end(), dots.begin(), dots.end());
    return out;
  }

  TokenRows tokens;
  Numbers weights;
  Numbers dout;
};

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() &&
         std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Runs the pulling with one of its numbers replaced. `wanted` is what comes out.
void CheckSpoilt(Pulling& pulling, Numbers32& field, std::size_t i, std::int32_t value,
                 const char* fault_in, const std::vector<float>& wanted,
                 std::mt19937_64& rng) {
  const Case which(std::string(fault_in) + "[" + Show(i) + "] = " + Show(value));
  const std::int32_t good = std::exchange(field[i], value);
  cpu::PlanFault fault;
  EP_CHECK(SameBits(pulling.Run(&fault, rng), wanted));
  CheckFault(fault, fault_in);
  pulling.Run(nullptr, rng);  // who does not ask need not be told
  field[i] = good;
}

// A choice whose row or rank is out of range counts as dropped.
EP_TEST(ChoicesOutOfRangeAreLeftOut) {
  std::mt19937_64 rng(1);
  // Tokens in one chunk, and in one each.
  for (const std::int64_t hidden : {5, 20000}) {
    Pulling pulling(rng, hidden);
    TokenRows& tokens = pulling.tokens;
    for (std::size_t i = 0; i < tokens.send_row.size(); i += hidden == 5 ? 1 : 3) {
      const std::int32_t row = std::exchange(tokens.send_row[i], kDropped);
      cpu::PlanFault fault;
      const std::vector<float> wanted = pulling.Run(&fault, rng);
      CheckFault(fault, "");
      tokens.send_row[i] = row;
      for (const std::int32_t value : NumbersOutside(tokens.geometry.capacity)) {
        const char* fault_in = value == kDropped ? "" : "send_row";
        CheckSpoilt(pulling, tokens.send_row, i, value, fault_in, wanted, rng);
      }
      for (const std::int32_t value : NumbersOutside(tokens.geometry.num_ranks)) {
        // The rank of a choice without a row is nobody's concern.
        const char* fault_in = row == kDropped ? "" : "send_rank";
        CheckSpoilt(pulling, tokens.send_rank, i, value, fault_in, wanted, rng);
      }
    }
  }
}

EP_TEST(AnyRowsOfAnyRanks) {
  std::mt19937_64 rng(2);
  Pulling pulling(rng);
  const TokenRows good = pulling.tokens;
  for (int turn = 0; turn < 3000; ++turn) {
    for (std::size_t i = 0; i < good.send_row.size(); ++i) {
      const auto any = [&](std::int32_t number, std::int64_t size) {
        const Numbers32 outside = NumbersOutside(size);
        return rng() % 3 == 0 ? outside[rng() % outside.size()] : number;
      };
      pulling.tokens.send_row[i] = any(good.send_row[i], good.geometry.capacity);
      pulling.tokens.send_rank[i] = any(good.send_rank[i], good.geometry.num_ranks);
    }
    cpu::PlanFault fault;
    pulling.Run(&fault, rng);
  }
}

// No choices at all, and choices among no ranks.
EP_TEST(NothingToPull) {
  std::mt19937_64 rng(3);
  Pulling pulling(rng);
  pulling.tokens.geometry.num_ranks = 0;
  cpu::PlanFault fault;
  const std::vector<float> zeros(static_cast<std::size_t>(pulling.dout.size()) +
                                 pulling.tokens.send_row.size());
  EP_CHECK(SameBits(pulling.Run(&fault, rng), zeros));
  CheckFault(fault, "send_rank");
  pulling.tokens.geometry.num_topk = 0;
  pulling.tokens.send_row.clear();
  pulling.tokens.send_rank.clear();
  EP_CHECK(SameBits(pulling.Run(&fault, rng),
                    std::vector<float>(static_cast<std::size_t>(pulling.dout.size()))));
}

// A window, the plan that says which of its rows ranks elsewhere pull, and which ranks
// these are: the second and the third of three.
struct Publishing {
  // Returns which rows are published.
  std::vector<bool> Run(cpu::PlanFault* fault, std::mt19937_64& rng) const {
    const auto size = static_cast<std::size_t>(kRows * kRowBytes);
    const std::vector<char> from(size, 'x');
    std::vector<char> to(size, '-');
    cpu::PublishRowsArgs args = {};
    args.from = from.data();
    args.to = to.data();
    args.ranges = {{0, kRows}};
    args.num_rows = kRows;
    args.row_bytes = kRowBytes;
    cpu::KeepPulledRows(recv_row.data(), recv_counts.data(), {false, true, true}, fault,
                        args);
    RunShuffled(cpu::PublishRowsWork(args), rng);
    std::vector<bool> published;
    for (std::int64_t row = 0; row < kRows; ++row) {
      const auto start = to.begin() + row * kRowBytes;
      published.push_back(
          std::all_of(start, start + kRowBytes, [](char c) { return c == 'x'; }));
    }
    return published;
  }

  static constexpr std::int64_t kRows = 8;
  static constexpr std::int64_t kRowBytes = 12;
  Numbers32 recv_row = {6, 0, 1, 7, 3, 1 << 30, 1 << 30, 1 << 30};
  Numbers32 recv_counts = {2, 1, 2};
};

EP_TEST(RowsThatRanksElsewherePullArePublished) {
  std::mt19937_64 rng(4);
  cpu::PlanFault fault;
  EP_CHECK(Publishing().Run(&fault, rng) ==
           std::vector<bool>({false, true, false, true, false, false, false, true}));
  CheckFault(fault, "");
}

// Peers do not know that the plan is bad: they find all that they may ask for.
EP_TEST(AllIsPublishedIfRowsAreOutOfRange) {
  std::mt19937_64 rng(5);
  const std::vector<bool> all(Publishing::kRows, true);
  for (const std::int32_t value : NumbersOutside(Publishing::kRows)) {
    for (std::size_t i = 0; i < 5; ++i) {
      const Case which("recv_row[" + Show(i) + "] = " + Show(value));
      Publishing publishing;
      publishing.recv_row[i] = value;
      cpu::PlanFault fault;
      const std::vector<bool> published = publishing.Run(&fault, rng);
      const bool is_elsewhere = i >= 2;
      CheckFault(fault, is_elsewhere ? "recv_row" : "");
      EP_CHECK(published == (is_elsewhere ? all : Publishing().Run(nullptr, rng)));
    }
  }
}

EP_TEST(AllIsPublishedIfCountsCannotBe) {
  std::mt19937_64 rng(6);
  for (const std::int32_t value : {kLowest, -1, 9, kHighest}) {
    for (std::size_t i = 0; i < 3; ++i) {
      const Case which("recv_counts[" + Show(i) + "] = " + Show(value));
      Publishing publishing;
      publishing.recv_counts[i] = value;
      cpu::PlanFault fault;
      EP_CHECK(publishing.Run(&fault, rng) ==
               std::vector<bool>(Publishing::kRows, true));
      CheckFault(fault, "recv_counts");
    }
  }
}

}  // namespace
}  // namespace jax_ep
