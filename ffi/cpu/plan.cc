#include "cpu/plan.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace jax_ep {
namespace {

constexpr std::int64_t kKeepAll = std::numeric_limits<std::int64_t>::max();

// A [rows, cols] table of counts.
class Counts {
 public:
  Counts(std::int64_t rows, std::int64_t cols)
      : cols_(cols), data_(static_cast<std::size_t>(rows * cols)) {}
  std::int32_t* row(std::int64_t i) { return data_.data() + i * cols_; }
  const std::int32_t* row(std::int64_t i) const { return data_.data() + i * cols_; }

 private:
  std::int64_t cols_;
  std::vector<std::int32_t> data_;
};

// Everything about the exchange that all plans share. R ranks, E experts.
struct Exchange {
  explicit Exchange(const PlanArgs& args)
      : asked(args.num_ranks, args.num_experts),
        kept(args.num_ranks, args.num_experts),
        first_row(args.num_ranks, args.num_experts),
        first_entry(args.num_ranks, args.num_ranks),
        group_rows(static_cast<std::size_t>(args.num_experts)),
        cutoff(static_cast<std::size_t>(args.num_ranks), kKeepAll),
        rank_of(static_cast<std::size_t>(args.num_experts)) {}

  Counts asked;        // [source, expert] choices
  Counts kept;         // [source, expert] choices that fit
  Counts first_row;    // [source, expert] row of a source's first kept choice
  Counts first_entry;  // [destination, source] where a source starts in the recv list
  std::vector<std::int32_t> group_rows;  // [expert]
  std::vector<std::int64_t> cutoff;      // [rank] keeps choices of lower Priority
  std::vector<std::int32_t> rank_of;     // [expert]
  bool overflows = false;
};

const std::int32_t* ChoicesOf(const PlanArgs& args, std::int64_t source) {
  return args.topk_idx + source * args.choices_per_rank();
}

// Position in the order (k, token, source rank).
std::int64_t Priority(const PlanArgs& args, std::int64_t k, std::int64_t token,
                      std::int64_t source) {
  return (k * args.num_tokens + token) * args.num_ranks + source;
}

// Choices that a rank keeps at most: what is left when each group pays the most padding.
std::int64_t PlanBudget(const PlanArgs& args) {
  return args.capacity - args.num_local_experts() * (args.alignment - 1);
}

std::int64_t RoundUp(std::int64_t rows, std::int64_t alignment) {
  return (rows + alignment - 1) / alignment * alignment;
}

void CountAsked(const PlanArgs& args, std::int64_t source, Exchange& exchange) {
  std::int32_t* asked = exchange.asked.row(source);
  const std::int32_t* choices = ChoicesOf(args, source);
  for (std::int64_t i = 0; i < args.choices_per_rank(); ++i) {
    if (choices[i] != kDropped) ++asked[choices[i]];
  }
}

// The rank that choice (source, token, k) goes to, or kDropped.
std::int32_t DestOf(const PlanArgs& args, const Exchange& exchange, std::int64_t source,
                    std::int64_t token, std::int64_t k) {
  const std::int32_t expert = ChoicesOf(args, source)[token * args.num_topk + k];
  return expert == kDropped ? kDropped
                            : exchange.rank_of[static_cast<std::size_t>(expert)];
}

// Returns the first position at which the running sum of count(0), count(1), … exceeds
// the budget, and takes what stands before it off the budget.
template <typename Count>
std::int64_t SpendBudget(std::int64_t& budget, Count count) {
  std::int64_t i = 0;
  for (; count(i) <= budget; ++i) budget -= count(i);
  return i;
}

// Finds where a rank of which too much is asked stops: first its k, then its token, then
// its source rank. Each step is one pass over all choices, for all such ranks together.
void FindCutoffs(const PlanArgs& args, const ParallelFor& parallel_for,
                 const std::vector<bool>& too_much, Exchange& exchange) {
  Counts by_k(args.num_ranks, args.num_ranks * args.num_topk);  // [source, (dest, k)]
  parallel_for(args.num_ranks, [&](std::int64_t s) {
    for (std::int64_t t = 0; t < args.num_tokens; ++t) {
      for (std::int64_t k = 0; k < args.num_topk; ++k) {
        const std::int32_t dest = DestOf(args, exchange, s, t, k);
        if (dest != kDropped) ++by_k.row(s)[dest * args.num_topk + k];
      }
    }
  });
  const auto num_ranks = static_cast<std::size_t>(args.num_ranks);
  std::vector<std::int64_t> budget(num_ranks, PlanBudget(args));
  std::vector<std::int64_t> last_k(num_ranks, -1);
  for (std::size_t d = 0; d < num_ranks; ++d) {
    if (!too_much[d]) continue;
    last_k[d] = SpendBudget(budget[d], [&](std::int64_t k) {
      std::int64_t count = 0;
      const std::int64_t column = static_cast<std::int64_t>(d) * args.num_topk + k;
      for (std::int64_t s = 0; s < args.num_ranks; ++s) count += by_k.row(s)[column];
      return count;
    });
  }
  Counts by_token(args.num_tokens, args.num_ranks);  // [token, dest], at last_k[dest]
  parallel_for(args.num_tokens, [&](std::int64_t t) {
    for (std::int64_t s = 0; s < args.num_ranks; ++s) {
      for (std::int64_t k = 0; k < args.num_topk; ++k) {
        const std::int32_t dest = DestOf(args, exchange, s, t, k);
        if (dest != kDropped && last_k[static_cast<std::size_t>(dest)] == k) {
          ++by_token.row(t)[dest];
        }
      }
    }
  });
  for (std::size_t d = 0; d < num_ranks; ++d) {
    if (!too_much[d]) continue;
    const auto dest = static_cast<std::int64_t>(d);
    const std::int64_t token = SpendBudget(
        budget[d], [&](std::int64_t t) { return by_token.row(t)[dest]; });
    const std::int64_t source = SpendBudget(budget[d], [&](std::int64_t s) {
      return DestOf(args, exchange, s, token, last_k[d]) == dest ? 1 : 0;
    });
    exchange.cutoff[d] = Priority(args, last_k[d], token, source);
  }
}

// Finds out which ranks are asked for more than they hold.
std::vector<bool> FindOverflows(const PlanArgs& args, const Exchange& exchange) {
  const std::int64_t num_local = args.num_local_experts();
  std::vector<bool> too_much;
  for (std::int64_t dest = 0; dest < args.num_ranks; ++dest) {
    std::int64_t incoming = 0;
    for (std::int64_t s = 0; s < args.num_ranks; ++s) {
      const std::int32_t* asked = exchange.asked.row(s) + dest * num_local;
      for (std::int64_t i = 0; i < num_local; ++i) incoming += asked[i];
    }
    too_much.push_back(incoming > PlanBudget(args));
  }
  return too_much;
}

bool IsKept(const PlanArgs& args, const Exchange& exchange, std::int64_t dest,
            std::int64_t k, std::int64_t token, std::int64_t source) {
  const std::int64_t cutoff = exchange.cutoff[static_cast<std::size_t>(dest)];
  return cutoff == kKeepAll || Priority(args, k, token, source) < cutoff;
}

void CountKept(const PlanArgs& args, std::int64_t source, Exchange& exchange) {
  std::int32_t* kept = exchange.kept.row(source);
  const std::int32_t* choices = ChoicesOf(args, source);
  if (!exchange.overflows) {
    std::copy_n(exchange.asked.row(source), args.num_experts, kept);
    return;
  }
  for (std::int64_t t = 0; t < args.num_tokens; ++t) {
    for (std::int64_t k = 0; k < args.num_topk; ++k) {
      const std::int32_t expert = choices[t * args.num_topk + k];
      if (expert == kDropped) continue;
      const std::int32_t dest = exchange.rank_of[static_cast<std::size_t>(expert)];
      if (IsKept(args, exchange, dest, k, t, source)) ++kept[expert];
    }
  }
}

// Lays out rank `dest`: where each group starts and, within it, each source's rows; and
// where each source's entries start in the receive list.
void LayOut(const PlanArgs& args, std::int64_t dest, Exchange& exchange) {
  const std::int64_t first = dest * args.num_local_experts();
  std::int32_t* entries = exchange.first_entry.row(dest);
  std::int64_t start = 0;
  for (std::int64_t e = first; e < first + args.num_local_experts(); ++e) {
    std::int64_t row = start;
    for (std::int64_t s = 0; s < args.num_ranks; ++s) {
      exchange.first_row.row(s)[e] = static_cast<std::int32_t>(row);
      row += exchange.kept.row(s)[e];
      entries[s] += exchange.kept.row(s)[e];
    }
    exchange.group_rows[static_cast<std::size_t>(e)] =
        static_cast<std::int32_t>(row - start);
    start += RoundUp(row - start, args.alignment);
  }
  std::int32_t sum = 0;
  for (std::int64_t s = 0; s < args.num_ranks; ++s) {
    sum += entries[s];
    entries[s] = sum - entries[s];
  }
}

// The ranks that plans are made for: a run of consecutive ones.
struct Planned {
  explicit Planned(const PlanArgs& args) : first(args.ranks[0]), count(args.num_plans) {}
  bool Has(std::int64_t rank) const { return rank >= first && rank < first + count; }

  std::int64_t first;
  std::int64_t count;
};

// Numbers the kept choices of `source`, and tells the planned ranks at their two ends:
// which row each choice was given, and which choices a rank receives.
class Placement {
 public:
  Placement(const PlanArgs& args, const Exchange& exchange, std::int64_t source)
      : args_(args),
        exchange_(exchange),
        planned_(args),
        source_(source),
        next_row_(exchange.first_row.row(source),
                  exchange.first_row.row(source) + args.num_experts),
        next_entry_(static_cast<std::size_t>(args.num_ranks)) {
    for (std::int64_t d = planned_.first; d < planned_.first + planned_.count; ++d) {
      next_entry_[static_cast<std::size_t>(d)] =
          (d - planned_.first) * args.capacity + exchange.first_entry.row(d)[source];
    }
  }

  void Run() {
    planned_.Has(source_) ? RunSender() : RunReceivers();
  }

 private:
  // Every choice of a planned source is numbered.
  void RunSender() {
    const std::int64_t plan = source_ - planned_.first;
    const std::int32_t* choices = ChoicesOf(args_, source_);
    std::int32_t* send_row = args_.send_row + plan * args_.choices_per_rank();
    bool* kept = args_.kept + plan * args_.choices_per_rank();
    std::int32_t dropped = 0;
    for (std::int64_t i = 0; i < args_.choices_per_rank(); ++i) {
      send_row[i] = choices[i] == kDropped ? kDropped : Place(choices[i], i);
      kept[i] = send_row[i] != kDropped;
      dropped += choices[i] != kDropped && !kept[i] ? 1 : 0;
    }
    args_.num_dropped[plan] = dropped;
  }

  // Of another source only the choices of planned ranks' experts matter.
  void RunReceivers() {
    const std::int64_t num_local = args_.num_local_experts();
    const auto first = static_cast<std::uint64_t>(planned_.first * num_local);
    const auto count = static_cast<std::uint64_t>(planned_.count * num_local);
    const std::int32_t* choices = ChoicesOf(args_, source_);
    for (std::int64_t i = 0; i < args_.choices_per_rank(); ++i) {
      // Unsigned: kDropped and what lies before the first are far beyond the count.
      if (static_cast<std::uint64_t>(choices[i]) - first < count) Place(choices[i], i);
    }
  }

  // Returns the row of the source's i-th choice, or kDropped.
  std::int32_t Place(std::int32_t expert, std::int64_t i) {
    const std::int32_t dest = exchange_.rank_of[static_cast<std::size_t>(expert)];
    if (exchange_.overflows &&
        !IsKept(args_, exchange_, dest, i % args_.num_topk, i / args_.num_topk,
                source_)) {
      return kDropped;
    }
    const std::int32_t row = next_row_[static_cast<std::size_t>(expert)]++;
    if (planned_.Has(dest)) {
      const std::int64_t entry = next_entry_[static_cast<std::size_t>(dest)]++;
      args_.recv_choice[entry] =
          static_cast<std::int32_t>(source_ * args_.choices_per_rank() + i);
      args_.recv_row[entry] = row;
    }
    return row;
  }

  const PlanArgs& args_;
  const Exchange& exchange_;
  Planned planned_;
  std::int64_t source_;
  std::vector<std::int32_t> next_row_;    // [expert]
  std::vector<std::int64_t> next_entry_;  // [planned rank], in all plans' recv lists
};

// A number that two calls with different choices or geometry hardly ever share.
std::uint32_t Fingerprint(const PlanArgs& args) {
  const std::int64_t count = args.num_ranks * args.choices_per_rank();
  std::uint64_t sum = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto position = static_cast<std::uint64_t>(i) * 0x9e3779b97f4a7c15ULL + 1;
    sum += static_cast<std::uint64_t>(args.topk_idx[i] + 2) * (position | 1);
  }
  sum ^= static_cast<std::uint64_t>(args.capacity) * 0xff51afd7ed558ccdULL;
  sum ^= static_cast<std::uint64_t>(args.alignment) * 0xc4ceb9fe1a85ec53ULL;
  sum ^= sum >> 29;
  return static_cast<std::uint32_t>((sum * 0xbf58476d1ce4e5b9ULL) >> 32);
}

void Summarize(const PlanArgs& args, const Exchange& exchange, std::uint32_t print,
               std::int64_t plan) {
  const std::int64_t num_local = args.num_local_experts();
  const std::int64_t first = args.ranks[plan] * num_local;
  std::int32_t* load = args.expert_load + plan * args.num_experts;
  std::fill_n(load, args.num_experts, 0);
  for (std::int64_t s = 0; s < args.num_ranks; ++s) {
    const std::int32_t* asked = exchange.asked.row(s);
    for (std::int64_t e = 0; e < args.num_experts; ++e) load[e] += asked[e];
    const std::int32_t* kept = exchange.kept.row(s) + first;
    std::int32_t received = 0;
    for (std::int64_t i = 0; i < num_local; ++i) received += kept[i];
    args.recv_counts[plan * args.num_ranks + s] = received;
  }
  for (std::int64_t i = 0; i < num_local; ++i) {
    const std::int32_t rows = exchange.group_rows[static_cast<std::size_t>(first + i)];
    args.group_rows[plan * num_local + i] = rows;
    args.group_sizes[plan * num_local + i] =
        static_cast<std::int32_t>(RoundUp(rows, args.alignment));
  }
  args.fingerprint[plan] = print;
}

}  // namespace

void RunPlan(const PlanArgs& args, const ParallelFor& parallel_for) {
  Exchange exchange(args);
  for (std::int64_t e = 0; e < args.num_experts; ++e) {
    exchange.rank_of[static_cast<std::size_t>(e)] =
        static_cast<std::int32_t>(e / args.num_local_experts());
  }
  parallel_for(args.num_ranks,
               [&](std::int64_t source) { CountAsked(args, source, exchange); });
  const std::vector<bool> too_much = FindOverflows(args, exchange);
  exchange.overflows = std::ranges::find(too_much, true) != too_much.end();
  if (exchange.overflows) FindCutoffs(args, parallel_for, too_much, exchange);
  parallel_for(args.num_ranks,
               [&](std::int64_t source) { CountKept(args, source, exchange); });
  parallel_for(args.num_ranks,
               [&](std::int64_t dest) { LayOut(args, dest, exchange); });
  parallel_for(args.num_ranks,
               [&](std::int64_t source) { Placement(args, exchange, source).Run(); });
  const std::uint32_t print = Fingerprint(args);
  parallel_for(args.num_plans, [&](std::int64_t plan) {
    Summarize(args, exchange, print, plan);
  });
}

}  // namespace jax_ep
