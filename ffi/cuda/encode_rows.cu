// Encodes rows on a GPU, to the same bits as on a CPU.

#include <algorithm>
#include <cstdint>

#include "common/float8.h"
#include "cuda/device.h"
#include "cuda/elements.h"
#include "cuda/encode_rows.h"

namespace jax_ep::cuda {
namespace {

// Neighbours that a lane encodes at once, if blocks consist of as many: then a warp
// takes 128, the usual block, in one step.
constexpr int kNeighbours = 4;

// Blocks of threads that a processor shall hold: many, as each lane has one load in
// flight.
constexpr int kBlocksEach = 5;

// The largest of a warp.
__device__ std::int32_t WarpMax(std::int32_t value) {
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    value = max(value, __shfl_xor_sync(kAllLanes, value, lanes));
  }
  return value;
}

// The largest finite size in a block, by one warp.
template <typename E, int count>
__device__ std::int32_t Largest(const typename E::Storage* x, std::int64_t size) {
  std::int32_t largest = 0;
  for (std::int64_t i = Lane() * count; i < size; i += kWarpSize * count) {
    const auto elements = *reinterpret_cast<const Elements<E, count>*>(x + i);
#pragma unroll
    for (int j = 0; j < count; ++j) {
      const std::int32_t one = SizeOf(Load<E>(elements.at[j]));
      largest = max(largest, IsFinite(one) ? one : 0);
    }
  }
  return WarpMax(largest);
}

template <int count>
struct alignas(count) Bytes {
  std::uint8_t at[count];
};

// Encodes a block by one warp, whose lanes' accesses are neighbours. It is read twice,
// the second time out of the first-level cache.
template <typename E, typename F, int count>
__device__ void EncodeBlock(const EncodeRowsArgs& args, std::int64_t row,
                            std::int64_t block) {
  const std::int64_t begin = block * args.block;
  const std::int64_t size = min(args.hidden - begin, args.block);
  const std::int64_t first = row * args.hidden + begin;
  const auto* x = static_cast<const typename E::Storage*>(args.x) + first;
  const float scale = ScaleOf<F>(Largest<E, count>(x, size), args.power_of_two);
  const float inverse = 1 / scale;
  for (std::int64_t i = Lane() * count; i < size; i += kWarpSize * count) {
    const auto elements = *reinterpret_cast<const Elements<E, count>*>(x + i);
    Bytes<count> encoded;
#pragma unroll
    for (int j = 0; j < count; ++j) {
      encoded.at[j] = RoundTo<F>(Load<E>(elements.at[j]) * inverse);
    }
    *reinterpret_cast<Bytes<count>*>(args.rows + first + i) = encoded;
  }
  if (Lane() == 0) args.scales[row * args.num_blocks + block] = scale;
}

// The warps of all blocks of threads share the blocks of all rows.
template <typename E, typename F, int count>
__global__ void __launch_bounds__(kThreads, kBlocksEach)
    EncodeRowsKernel(const __grid_constant__ EncodeRowsArgs args) {
  const std::int64_t all = args.num_rows * args.num_blocks;
  for (std::int64_t i = WarpOfRank(); i < all; i += WarpsOfRank()) {
    EncodeBlock<E, F, count>(args, i / args.num_blocks, i % args.num_blocks);
  }
}

template <typename E, typename F, int count>
cudaError_t LaunchEncoding(const EncodeRowsArgs& args, cudaStream_t stream) {
  constexpr auto kKernel = EncodeRowsKernel<E, F, count>;
  std::int64_t resident = 0;
  const cudaError_t error = CountResidentBlocks<kKernel>(kThreads, &resident);
  if (error != cudaSuccess) return error;
  const std::int64_t wanted = (args.num_rows * args.num_blocks + kWarps - 1) / kWarps;
  const dim3 blocks(1, static_cast<unsigned>(std::min(wanted, resident)));
  return Launch(kKernel, blocks, kThreads, stream, args);
}

template <typename E, typename F>
cudaError_t EncodeInSteps(const EncodeRowsArgs& args, cudaStream_t stream) {
  return AreAligned(kNeighbours, args.hidden, args.block)
             ? LaunchEncoding<E, F, kNeighbours>(args, stream)
             : LaunchEncoding<E, F, 1>(args, stream);
}

template <typename E>
cudaError_t EncodeFrom(const EncodeRowsArgs& args, cudaStream_t stream) {
  return args.to == Float8::kE4M3 ? EncodeInSteps<E, E4M3>(args, stream)
                                  : EncodeInSteps<E, E5M2>(args, stream);
}

}  // namespace

cudaError_t EncodeRows(const EncodeRowsArgs& args, cudaStream_t stream) {
  switch (args.dtype) {
    case DType::kBF16:
      return EncodeFrom<BF16>(args, stream);
    case DType::kF16:
      return EncodeFrom<F16>(args, stream);
    case DType::kF32:
      return EncodeFrom<F32>(args, stream);
    case DType::kF64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace jax_ep::cuda
