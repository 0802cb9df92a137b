#ifndef JAX_EP_FFI_CPU_PLAN_PLACEMENT_H_
#define JAX_EP_FFI_CPU_PLAN_PLACEMENT_H_

#include <cstdint>
#include <vector>

#include "common/plan.h"
#include "cpu/plan_tables.h"

namespace jax_ep {

// The ranks that plans are made for: a run of consecutive ones.
struct Planned {
  explicit Planned(const PlanArgs& args)
      : first(args.ranks[0]), count(args.num_plans) {}
  bool Has(std::int64_t rank) const { return rank >= first && rank < first + count; }

  std::int64_t first;
  std::int64_t count;
};

// Numbers the kept choices of `source`, and tells the planned ranks at their two ends:
// which row each choice was given, and which choices a rank receives.
class Placement {
 public:
  Placement(const PlanArgs& args, const PlanTables& tables, std::int64_t source)
      : args_(args),
        tables_(tables),
        planned_(args),
        source_(source),
        next_row_(tables.first_row.row(source),
                  tables.first_row.row(source) + args.num_experts),
        next_entry_(static_cast<std::size_t>(args.num_ranks)) {
    for (std::int64_t d = planned_.first; d < planned_.first + planned_.count; ++d) {
      next_entry_[static_cast<std::size_t>(d)] =
          (d - planned_.first) * args.capacity + tables.first_entry.row(d)[source];
    }
  }

  void Run() { planned_.Has(source_) ? RunSender() : RunReceivers(); }

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
    const std::int32_t dest = tables_.rank_of[static_cast<std::size_t>(expert)];
    if (tables_.overflows && !IsKept(args_, tables_, dest, i % args_.num_topk,
                                     i / args_.num_topk, source_)) {
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
  const PlanTables& tables_;
  Planned planned_;
  std::int64_t source_;
  std::vector<std::int32_t> next_row_;    // [expert]
  std::vector<std::int64_t> next_entry_;  // [planned rank], in all plans' recv lists
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_CPU_PLAN_PLACEMENT_H_
