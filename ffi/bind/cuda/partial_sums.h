// Ops whose ranks may add up rows of a token before its rank pulls them. Python says of
// each call whether they do.
#ifndef JAX_EP_FFI_BIND_CUDA_PARTIAL_SUMS_H_
#define JAX_EP_FFI_BIND_CUDA_PARTIAL_SUMS_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "bind/call_reader.h"
#include "bind/ops.h"
#include "common/partial_sums.h"
#include "cuda/partial_sums.h"

namespace jax_ep {

struct SummedCall : ReduceRowsOp::Call {
  std::vector<PartialSumsArgs> sums;  // one for each kernel, or none
};

// Where partial sums are made.
enum class SumsPlace : std::uint8_t {
  kResult,  // which XLA hands the handler, for peers that read rows where they are
  kWindow,  // which peers read in place of the rows
};

// ReduceRowsOp or ReduceScaledOp, with partial sums.
template <typename Op, SumsPlace kPlace>
struct Summed {
  using Call = SummedCall;
  static constexpr bool kWeighted = std::is_same_v<Op, ReduceScaledOp>;
  static constexpr bool kInWindow = kPlace == SumsPlace::kWindow;

  static Call Read(CallReader& reader) {
    const bool is_used = reader.Attribute("partial_sums") != 0;
    const std::int64_t choices =
        reader.Attribute("num_tokens") * reader.Attribute("num_topk");
    const float* weights = nullptr;
    if constexpr (kWeighted) {
      // Of all ranks, or of this one, which nobody reads.
      const std::int64_t ranks = is_used ? reader.where().num_ranks : 1;
      weights = reader.Operand<float>("gathered", ranks * choices);
    }
    Call call = {Op::Read(reader), {}};
    for (ReduceRowsArgs& args : call.kernels) {
      void* partials = kInWindow ? nullptr : ReadPartials(reader, is_used, args);
      if (!is_used) continue;
      const std::int64_t bytes = choices * static_cast<std::int64_t>(sizeof(float));
      AddSums(partials, PeerTable(weights, bytes), args, call);
    }
    return call;
  }

  // Says which rank makes the call, and whether it has a window for others to read.
  static void SetPlace(Call& call, std::int32_t rank, bool has_window) {
    for (ReduceRowsArgs& args : call.kernels) {
      args.first_token = rank * args.num_tokens;
      if (kInWindow && !has_window) args.pulled = Pulled::kRows;
    }
    if (kInWindow && !has_window) call.sums.clear();
  }

  // Rows, and behind them the sums, which are for ranks of this process. Or sums alone.
  static std::vector<LentRows> LentBy(const Call& call) {
    std::vector<LentRows> lent;
    if (!kInWindow || call.sums.empty()) lent = Op::LentBy(call);
    for (const PartialSumsArgs& args : call.sums) {
      lent.push_back(
          {.data = args.partials,
           .num_rows = kInWindow ? NumPartials(args) : 0,
           .row_bytes = kInWindow ? args.hidden * ByteWidth(args.dtype) : 0});
    }
    return lent;
  }

  static void SetPeers(Call& call, Tables tables) {
    Op::SetPeers(call, tables);
    const std::size_t first = kInWindow ? 0 : call.kernels.size();
    for (std::size_t i = 0; i < call.sums.size(); ++i) {
      call.kernels[i].partials = tables[first + i];
    }
  }

  // Puts on the stream what has to be done before peers read what is lent: at these
  // places in the window, if that is where.
  static cudaError_t Prepare(const Call& call, const std::vector<void*>& places,
                             cudaStream_t stream) {
    for (std::size_t i = 0; i < call.sums.size(); ++i) {
      PartialSumsArgs args = call.sums[i];
      if (kInWindow) args.partials = places[i];
      const cudaError_t error = cuda::SumPartials(args, 1, stream);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }

 private:
  static void* ReadPartials(CallReader& reader, bool is_used,
                            const ReduceRowsArgs& args) {
    const Tensor partials = reader.Result(kWeighted ? "partials" : "*partials", 0);
    const std::int64_t size = is_used ? NumPartials(args) * args.hidden : 1;
    reader.Require(KernelDType(partials.type) == args.dtype, "partials as rows");
    reader.Require(partials.elements() == size, "all partial sums, or one element");
    return partials.data;
  }

  // Has a kernel pull partial sums, and this rank make its own.
  static void AddSums(void* partials, const PeerTable& weights, ReduceRowsArgs& args,
                      Call& call) {
    args.pulled = kInWindow ? Pulled::kSums : Pulled::kSumsOfSeveral;
    call.sums.push_back({.rows = args.rows[0],
                         .weights = weights,
                         .recv_choice = call.plan.recv_choice,
                         .recv_row = call.plan.recv_row,
                         .recv_counts = call.plan.recv_counts,
                         .partials = partials,
                         .num_ranks = args.num_ranks,
                         .num_tokens = args.num_tokens,
                         .num_topk = args.num_topk,
                         .capacity = args.capacity,
                         .hidden = args.hidden,
                         .dtype = args.dtype,
                         .weighted = kWeighted,
                         .all = kInWindow});
  }
};

// An op as it is where partial sums may be used: most have none.
template <typename Op, SumsPlace kPlace>
using WithPartialSums =
    std::conditional_t<std::is_base_of_v<PullOp<ReduceRowsArgs>, Op>,
                       Summed<Op, kPlace>, Op>;

}  // namespace jax_ep

#endif  // JAX_EP_FFI_BIND_CUDA_PARTIAL_SUMS_H_
