// What the CPU's and the GPU's make_plan are told, and their callers fill in.

#ifndef JAX_EP_FFI_COMMON_PLAN_H_
#define JAX_EP_FFI_COMMON_PLAN_H_

#include <cstdint>

#include "common/host_device.h"
#include "common/peer_table.h"

namespace jax_ep {

// One rank's plan, to be filled in; R ranks, T tokens, K choices, E experts, L = E / R.
struct PlanArrays {
  std::int32_t* group_sizes;   // [L]
  bool* kept;                  // [T, K]
  std::int32_t* expert_load;   // [E]
  std::int32_t* recv_counts;   // [R]
  std::int32_t* num_dropped;   // []
  std::int32_t* send_rank;     // [T, K], rank with the choice's row, or kDropped
  std::int32_t* send_row;      // [T, K], row on that rank, or kDropped
  std::int32_t* recv_choice;   // [capacity], by (source rank, token, k)
  std::int32_t* recv_row;      // [capacity], the row of each recv_choice
  std::int32_t* group_rows;    // [L], group_sizes less the padding
  std::uint32_t* fingerprint;  // [], equal on all ranks
};

// Makes the plans of some or all ranks from the choices of all.
struct PlanArgs {
  PeerTable topk_idx;  // int32 [T, K], each in [0, E) or kDropped
  PeerTable outputs;   // PlanArrays, or null: no plan for this rank
  std::int64_t num_ranks;
  std::int64_t num_tokens;
  std::int64_t num_topk;
  std::int64_t num_experts;
  std::int64_t capacity;
  std::int64_t alignment;

  EP_HOST_DEVICE const std::int32_t* ChoicesOf(std::int64_t rank) const {
    return static_cast<const std::int32_t*>(topk_idx[rank]);
  }
  const PlanArrays* OutputsOf(std::int64_t rank) const {
    return static_cast<const PlanArrays*>(outputs[rank]);
  }
  EP_HOST_DEVICE std::int64_t num_local_experts() const {
    return num_experts / num_ranks;
  }
  EP_HOST_DEVICE std::int64_t choices_per_rank() const { return num_tokens * num_topk; }

  // The outputs of another rank that lie behind those of the first.
  EP_HOST_DEVICE PlanArrays OfStacked(const PlanArrays& first, std::int64_t i) const {
    return {
        .group_sizes = first.group_sizes + i * num_local_experts(),
        .kept = first.kept + i * choices_per_rank(),
        .expert_load = first.expert_load + i * num_experts,
        .recv_counts = first.recv_counts + i * num_ranks,
        .num_dropped = first.num_dropped + i,
        .send_rank = first.send_rank + i * choices_per_rank(),
        .send_row = first.send_row + i * choices_per_rank(),
        .recv_choice = first.recv_choice + i * capacity,
        .recv_row = first.recv_row + i * capacity,
        .group_rows = first.group_rows + i * num_local_experts(),
        .fingerprint = first.fingerprint + i,
    };
  }
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_COMMON_PLAN_H_
