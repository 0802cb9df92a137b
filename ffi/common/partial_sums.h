// What the GPU's partial_sums are told, and how they go together with reduce_rows.

#ifndef JAX_EP_FFI_COMMON_PARTIAL_SUMS_H_
#define JAX_EP_FFI_COMMON_PARTIAL_SUMS_H_

#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"
#include "common/peer_table.h"

namespace jax_ep {

// Whether partial sums stand by token, as there are fewer of these than rows.
template <typename Args>
EP_HOST_DEVICE constexpr bool StandByToken(const Args& args) {
  return args.num_ranks * args.num_tokens < args.capacity;
}

// How many partial sums a rank has room for.
template <typename Args>
EP_HOST_DEVICE constexpr std::int64_t NumPartials(const Args& args) {
  return StandByToken(args) ? args.num_ranks * args.num_tokens : args.capacity;
}

// One rank adds up its rows of each token that has several here, before the tokens'
// ranks pull them by reduce_rows: one row of each rank crosses the wire for a token,
// and not one for each choice. They are the partial sums that reduce_rows.h describes,
// to the last bit. That of a token stands where its first choice has its row or, if
// there are fewer tokens than rows, at the token's number among those of all ranks.
struct PartialSumsArgs {
  const void* rows;                 // [capacity, hidden]
  PeerTable weights;                // float32 [num_tokens, num_topk], read if weighted
  const std::int32_t* recv_choice;  // [capacity], by (source rank, token, k)
  const std::int32_t* recv_row;     // [capacity]
  const std::int32_t* recv_counts;  // [num_ranks], entries of recv_choice in use
  void* partials;                   // [NumPartials(), hidden]
  std::int64_t num_ranks;
  std::int64_t num_tokens;
  std::int64_t num_topk;
  std::int64_t capacity;
  std::int64_t hidden;
  DType dtype;    // of rows and partials
  bool weighted;  // whether rows count as often as weights say, or once
  // Whether tokens with one row here have a sum as well. Else they find it in `rows`.
  bool all;

  // The arguments of another rank whose operands lie behind this one's.
  EP_HOST_DEVICE PartialSumsArgs OfStacked(std::int64_t i) const {
    PartialSumsArgs args = *this;
    const std::int64_t bytes = capacity * hidden * ByteWidth(dtype);
    args.rows = static_cast<const char*>(rows) + i * bytes;
    args.recv_choice += i * capacity;
    args.recv_row += i * capacity;
    args.recv_counts += i * num_ranks;
    args.partials = static_cast<char*>(partials) +
                    i * NumPartials(args) * hidden * ByteWidth(dtype);
    return args;
  }
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_COMMON_PARTIAL_SUMS_H_
