// One rank's part of a plan that no rank makes alone: it sees its own choices, and is
// told what the ranks that own the experts have decided.

#ifndef JAX_EP_FFI_CPU_OWN_CHOICES_H_
#define JAX_EP_FFI_CPU_OWN_CHOICES_H_

#include <cstdint>

namespace jax_ep::cpu {

// R ranks, T tokens, K choices, E experts.
struct OwnChoices {
  const std::int32_t* topk_idx;  // [T, K], each in [0, E) or kDropped
  // [R], keeps those before this place in the order (k, token, source rank).
  const std::int32_t* cutoffs;
  std::int64_t rank;  // the source
  std::int64_t num_ranks;
  std::int64_t num_tokens;
  std::int64_t num_topk;
  std::int64_t num_experts;
};

struct ChoiceCounts {
  std::int32_t* kept;          // [E]
  std::int32_t* asked_by_k;    // [R, K], whether kept or not
  std::uint32_t* fingerprint;  // [], of all choices at their places
};

struct PlacedChoices {
  bool* kept;                 // [T, K]
  std::int32_t* send_rank;    // [T, K], or kDropped
  std::int32_t* send_row;     // [T, K], or kDropped
  std::int32_t* place;        // [T, K], its number among those to one rank, or kDropped
  std::int32_t* num_dropped;  // []
};

// Costs O(T * K + E + R * K).
void CountChoices(const OwnChoices& choices, const ChoiceCounts& counts);

// Gives kept choices their rows, of which `first_rows` [E] says where those of each
// expert begin. Costs O(T * K + E + R).
void PlaceChoices(const OwnChoices& choices, const std::int32_t* first_rows,
                  const PlacedChoices& placed);

}  // namespace jax_ep::cpu

#endif  // JAX_EP_FFI_CPU_OWN_CHOICES_H_
