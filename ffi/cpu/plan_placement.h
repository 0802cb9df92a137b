// The last pass of plan.cc over the choices, source by source.

#ifndef JAX_EP_FFI_CPU_PLAN_PLACEMENT_H_
#define JAX_EP_FFI_CPU_PLAN_PLACEMENT_H_

#include <cstdint>
#include <vector>

#include "common/dropped.h"
#include "common/plan.h"
#include "cpu/plan_tables.h"

namespace jax_ep::cpu {

// Numbers the kept choices of `source`, and tells the planned ranks at their two ends:
// where each choice was given its row, and which choices a rank receives.
class Placement {
 public:
  Placement(const PlanArgs& args, const PlanTables& tables, std::int64_t source)
      : args_(args),
        tables_(tables),
        source_(source),
        next_row_(tables.first_row.row(source),
                  tables.first_row.row(source) + args.num_experts) {
    for (std::int64_t dest = 0; dest < args.num_ranks; ++dest) {
      const PlanArrays* plan = args.OutputsOf(dest);
      const std::int32_t entry = tables.first_entry.row(dest)[source];
      next_entry_.push_back(plan == nullptr ? Entry{}
                                            : Entry{.choice = plan->recv_choice + entry,
                                                    .row = plan->recv_row + entry});
    }
  }

  void Run() {
    const std::int32_t* choices = args_.ChoicesOf(source_);
    const PlanArrays* plan = args_.OutputsOf(source_);
    std::int32_t dropped = 0;
    for (std::int64_t i = 0; i < args_.choices_per_rank(); ++i) {
      const Target to = choices[i] == kDropped ? Target{} : Place(choices[i], i);
      if (plan == nullptr) continue;
      plan->send_rank[i] = to.rank;
      plan->send_row[i] = to.row;
      plan->kept[i] = to.row != kDropped;
      dropped += choices[i] != kDropped && to.row == kDropped ? 1 : 0;
    }
    if (plan != nullptr) *plan->num_dropped = dropped;
  }

 private:
  // Where a choice has its row, if it has one.
  struct Target {
    std::int32_t rank = kDropped;
    std::int32_t row = kDropped;
  };

  // Where a rank's receive list goes on.
  struct Entry {
    std::int32_t* choice = nullptr;
    std::int32_t* row = nullptr;
  };

  // Gives the source's i-th choice a row, if it is kept.
  Target Place(std::int32_t expert, std::int64_t i) {
    const std::int32_t dest = tables_.rank_of[static_cast<std::size_t>(expert)];
    if (tables_.overflows && !IsKept(args_, tables_, dest, i % args_.num_topk,
                                     i / args_.num_topk, source_)) {
      return {};
    }
    const std::int32_t row = next_row_[static_cast<std::size_t>(expert)]++;
    Entry& entry = next_entry_[static_cast<std::size_t>(dest)];
    if (entry.choice != nullptr) {
      *entry.choice++ =
          static_cast<std::int32_t>(source_ * args_.choices_per_rank() + i);
      *entry.row++ = row;
    }
    return {.rank = dest, .row = row};
  }

  const PlanArgs& args_;
  const PlanTables& tables_;
  std::int64_t source_;
  std::vector<std::int32_t> next_row_;  // [expert]
  std::vector<Entry> next_entry_;       // [destination]
};

}  // namespace jax_ep::cpu

#endif  // JAX_EP_FFI_CPU_PLAN_PLACEMENT_H_
