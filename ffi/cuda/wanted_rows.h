// What gather_rows.cu and gather_scaled.cu have in common: who wants which token, how
// warps share that, and what nobody fills.

#ifndef JAX_EP_FFI_CUDA_WANTED_ROWS_H_
#define JAX_EP_FFI_CUDA_WANTED_ROWS_H_

#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/gather_rows.h"
#include "cuda/device.h"

namespace jax_ep::cuda {

// How much of one rank's receive list and rows is in use: at most what there is.
struct Received {
  std::int64_t entries;
  std::int64_t rows;
};

__device__ inline std::int64_t Clamp(std::int64_t value, std::int64_t highest) {
  return value < 0 ? 0 : value < highest ? value : highest;
}

// Called by all threads of a block.
__device__ inline Received ReceivedBy(const GatherRowsArgs& args) {
  __shared__ Received received;
  if (WarpInBlock() == 0) {
    const std::int64_t entries =
        args.FillsWithOwn() ? 0 : WarpTotal(args.recv_counts, args.num_ranks);
    const std::int64_t rows = WarpTotal(args.group_sizes, args.num_local_experts);
    if (Lane() == 0) {
      received = {Clamp(entries, args.capacity), Clamp(rows, args.capacity)};
    }
  }
  __syncthreads();
  return received;
}

// Has blocks go by the tokens of their rank, if all ranks are stacked, whose rows then
// lie one behind the other. If not, by its receive list, and without the send lists.
inline GatherRowsArgs ForLaunch(GatherRowsArgs args, std::int64_t num_stacked) {
  const bool all_are_here = num_stacked == args.num_ranks && !args.x.has_addresses();
  if (!all_are_here || args.send_rank == nullptr) args.send_row = nullptr;
  return args;
}

__host__ __device__ inline bool GoesBySource(const GatherRowsArgs& args) {
  return args.send_row != nullptr;
}

// What the warps of a rank share: its tokens, or the entries of its receive list.
__device__ inline std::int64_t Positions(const GatherRowsArgs& args,
                                         const Received& received) {
  return GoesBySource(args) ? args.num_tokens : received.entries;
}

// A token, and who wants it: so many of its choices, or entries of the receive list.
// Without any, those are another warp's.
struct WantedToken {
  std::int32_t rank;
  std::int32_t token;  // of that rank
  std::int32_t first;
  std::int32_t count;
};

// Finds the token of an entry, if it is the first that wants it, and how many do; by
// one warp, which looks at an entry per lane from the one before on.
__device__ inline WantedToken WantedByEntry(const GatherRowsArgs& args,
                                            const Received& received,
                                            std::int64_t entry) {
  const auto token_of = [&](std::int64_t i) {
    return i >= 0 && i < received.entries ? args.TokenOf(i) : kNoToken;
  };
  const std::int32_t seen = token_of(entry - 1 + Lane());
  const std::int32_t wanted = __shfl_sync(kAllLanes, seen, 1);
  unsigned equals = __ballot_sync(kAllLanes, seen == wanted ? 1 : 0);
  if (wanted == kNoToken || (equals & 1) != 0) return {};
  std::int32_t count = __ffs(static_cast<int>(~(equals >> 1))) - 1;
  for (std::int32_t ahead = kWarpSize - 1; count == ahead; ahead += kWarpSize) {
    const bool is_equal = token_of(entry + ahead + Lane()) == wanted;
    equals = __ballot_sync(kAllLanes, is_equal ? 1 : 0);
    count += equals == kAllLanes ? kWarpSize : __ffs(static_cast<int>(~equals)) - 1;
  }
  const auto tokens = static_cast<std::int32_t>(args.num_tokens);
  return {wanted / tokens, wanted % tokens, static_cast<std::int32_t>(entry), count};
}

__device__ inline WantedToken WantedAt(const GatherRowsArgs& args,
                                       const Received& received,
                                       std::int64_t position) {
  if (!GoesBySource(args)) return WantedByEntry(args, received, position);
  const auto topk = static_cast<std::int32_t>(args.num_topk);
  const auto token = static_cast<std::int32_t>(position);
  return {static_cast<std::int32_t>(blockIdx.x), token, token * topk, topk};
}

// The row of the i-th that wants a token, from the rank's first row on, or that there
// is none.
inline constexpr std::int64_t kNoRow = std::numeric_limits<std::int64_t>::min();
__device__ inline std::int64_t RowOf(const GatherRowsArgs& args,
                                     const WantedToken& wanted, std::int32_t i) {
  if (i >= wanted.count) return kNoRow;
  if (!GoesBySource(args)) {
    const std::int32_t row = args.recv_row[wanted.first + i];
    return IsIndex(row, args.capacity) ? row : kNoRow;
  }
  if (!HasRow(args, wanted.first + i)) return kNoRow;
  const std::int64_t ranks_on = args.send_rank[wanted.first + i] - wanted.rank;
  return ranks_on * args.capacity + args.send_row[wanted.first + i];
}

// What that row is scaled by.
__device__ inline float WeightOf(const GatherRowsArgs& args, const WantedToken& wanted,
                                 std::int32_t i) {
  if (i >= wanted.count) return 0;
  const auto topk = static_cast<std::int32_t>(args.num_topk);
  const std::int32_t k =
      GoesBySource(args) ? i : args.recv_choice[wanted.first + i] % topk;
  const auto* weights = static_cast<const float*>(args.weights[wanted.rank]);
  return LoadPeer(weights + wanted.token * args.num_topk + k);
}

// In how many pieces a row comes of which a lane holds so many units.
__host__ __device__ constexpr std::int64_t PiecesOf(std::int64_t units, int per_lane) {
  const std::int64_t held = std::int64_t{per_lane} * kWarpSize;
  return (units + held - 1) / held;
}

// How many pieces a rank's warps share at most, of rows of so many units.
inline std::int64_t NumPieces(const GatherRowsArgs& args, std::int64_t units,
                              int per_lane) {
  const std::int64_t tokens = GoesBySource(args) ? args.num_tokens : 0;
  return std::max(tokens, args.capacity) * PiecesOf(units, per_lane);
}

// How a rank's warps share positions: in pieces of rows that are so short that a warp
// holds one at once. Neighbouring warps have neighbouring pieces.
class Pieces {
 public:
  // Of rows of `units`, of which a lane holds `per_lane`.
  __device__ Pieces(int units, int per_lane) : units_(units) {
    const int steps = (units + kWarpSize - 1) / kWarpSize;
    per_row_ = static_cast<int>(PiecesOf(units, per_lane));
    piece_units_ = (steps + per_row_ - 1) / per_row_ * kWarpSize;
    const auto warp = static_cast<int>(WarpOfRank());
    position_ = warp / per_row_;
    piece_ = warp % per_row_;
  }

  // Whose turn it is.
  __device__ std::int64_t position() const { return position_; }
  // Which units of its row: this lane's first, and how many are left from there on.
  __device__ int begin() const { return piece_ * piece_units_ + Lane(); }
  __device__ int left() const {
    return min((piece_ + 1) * piece_units_, units_) - begin();
  }

  __device__ void Next() {
    const auto warps = static_cast<int>(WarpsOfRank());
    position_ += warps / per_row_;
    piece_ += warps % per_row_;
    if (piece_ < per_row_) return;
    piece_ -= per_row_;
    ++position_;
  }

 private:
  int units_;
  int per_row_;
  int piece_units_;
  std::int64_t position_;
  int piece_;
};

// Zeroes a row, by one warp.
template <typename Unit>
__device__ inline void ZeroRow(const GatherRowsArgs& args, std::int64_t row) {
  auto* to =
      reinterpret_cast<Unit*>(static_cast<char*>(args.rows) + row * args.row_bytes);
  const std::int64_t units = args.row_bytes / static_cast<std::int64_t>(sizeof(Unit));
  for (std::int64_t u = Lane(); u < units; u += kWarpSize) StoreToRow(to + u, Unit{});
}

// Zeroes what no choice fills: the padding inside groups and, where it is to be zero,
// the tail. All warps of the rank do their share.
template <typename Unit>
__device__ inline void ZeroUnfilled(const GatherRowsArgs& args,
                                    std::int64_t used_rows) {
  const std::int64_t warp = WarpOfRank();
  const std::int64_t warps = WarpsOfRank();
  for (std::int64_t e = warp; e < args.num_local_experts; e += warps) {
    if (args.group_rows[e] == args.group_sizes[e]) continue;
    const std::int64_t start = WarpTotal(args.group_sizes, e);
    const std::int64_t end = Clamp(start + args.group_sizes[e], args.capacity);
    for (std::int64_t row = Clamp(start + args.group_rows[e], args.capacity); row < end;
         ++row) {
      ZeroRow<Unit>(args, row);
    }
  }
  if (!args.zero_tail) return;
  for (std::int64_t row = used_rows + warp; row < args.capacity; row += warps) {
    ZeroRow<Unit>(args, row);
  }
}

}  // namespace jax_ep::cuda

#endif  // JAX_EP_FFI_CUDA_WANTED_ROWS_H_
