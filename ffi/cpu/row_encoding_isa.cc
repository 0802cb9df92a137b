// Compiled once per instruction set, as row_math_isa.cc, with EP_ENCODE_LOOP naming the
// function that it defines.

#include <cstdint>

#include "common/element.h"
#include "common/float8.h"
#include "cpu/row_encoding.h"

namespace jax_ep::cpu {
namespace {

// The largest size in a block, of all that it holds or of what is finite.
template <typename E, bool all>
std::int32_t Largest(const typename E::Storage* x, std::int64_t size) {
  std::int32_t largest = 0;
  for (std::int64_t i = 0; i < size; ++i) {
    const std::int32_t one = SizeOf(E::Load(x[i]));
    const std::int32_t counted = all || IsFinite(one) ? one : 0;
    largest = counted > largest ? counted : largest;
  }
  return largest;
}

// Returns the scale.
template <typename E, typename F>
float EncodeBlock(const typename E::Storage* __restrict x, std::int64_t size,
                  bool power_of_two, std::uint8_t* __restrict out) {
  const std::int32_t largest = Largest<E, true>(x, size);
  if (!IsFinite(largest)) {
    const float scale = ScaleOf<F>(Largest<E, false>(x, size), power_of_two);
    const float inverse = 1 / scale;
    for (std::int64_t i = 0; i < size; ++i) {
      out[i] = RoundTo<F>(E::Load(x[i]) * inverse);
    }
    return scale;
  }
  const float scale = ScaleOf<F>(largest, power_of_two);
  const float inverse = 1 / scale;
  for (std::int64_t i = 0; i < size; ++i) {
    out[i] = RoundFinite<F>(E::Load(x[i]) * inverse);
  }
  return scale;
}

template <typename E, typename F>
void Encode(const EncodeRowsArgs& args, std::int64_t row) {
  const auto* x = static_cast<const typename E::Storage*>(args.x) + row * args.hidden;
  std::uint8_t* out = args.rows + row * args.hidden;
  float* scales = args.scales + row * args.num_blocks;
  for (std::int64_t i = 0; i < args.num_blocks; ++i) {
    const std::int64_t begin = i * args.block;
    const std::int64_t left = args.hidden - begin;
    const std::int64_t size = left < args.block ? left : args.block;
    scales[i] = EncodeBlock<E, F>(x + begin, size, args.power_of_two, out + begin);
  }
}

template <typename E>
void EncodeFrom(const EncodeRowsArgs& args, std::int64_t begin, std::int64_t end) {
  const auto encode = args.to == Float8::kE4M3 ? Encode<E, E4M3> : Encode<E, E5M2>;
  for (std::int64_t i = begin; i < end; ++i) encode(args, i);
}

}  // namespace

void EP_ENCODE_LOOP(const EncodeRowsArgs& args, std::int64_t begin, std::int64_t end) {
  if (args.dtype == DType::kBF16) return EncodeFrom<BF16>(args, begin, end);
  if (args.dtype == DType::kF16) return EncodeFrom<F16>(args, begin, end);
  EncodeFrom<F32>(args, begin, end);
}

}  // namespace jax_ep::cpu
