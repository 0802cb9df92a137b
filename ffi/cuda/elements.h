// Loads, stores, conversions and fma for any dtype, for the kernels that compute.

#ifndef JAX_EP_FFI_CUDA_ELEMENTS_H_
#define JAX_EP_FFI_CUDA_ELEMENTS_H_

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#include "common/element.h"
#include "cuda/device.h"
#include "cuda/ptx.h"

namespace jax_ep::cuda {

// Neighbouring elements that a lane loads at once.
template <typename E, int count>
struct alignas(count * sizeof(typename E::Storage)) Elements {
  typename E::Storage at[count];
};

// As many as are 16 bytes.
template <typename E>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(typename E::Storage));

// What as many bytes are stored as.
template <typename E, int count>
using UnitOf = std::conditional_t<
    count == 1, typename E::Storage,
    std::conditional_t<sizeof(Elements<E, count>) == 4, std::uint32_t, uint4>>;

template <typename E, int count>
__device__ inline Elements<E, count> LoadElements(const void* row, std::int64_t first) {
  const auto* p = static_cast<const typename E::Storage*>(row) + first;
  return LoadPeer(reinterpret_cast<const Elements<E, count>*>(p));
}

// Calls store(address, value) with the elements as one unit.
template <typename E, int count, typename Store>
__device__ inline void StoreBy(void* row, std::int64_t first,
                               const Elements<E, count>& elements, Store store) {
  UnitOf<E, count> unit;
  static_assert(sizeof(unit) == sizeof(elements));
  __builtin_memcpy(&unit, &elements, sizeof(unit));
  store(reinterpret_cast<UnitOf<E, count>*>(static_cast<typename E::Storage*>(row) +
                                            first),
        unit);
}

template <typename E, int count>
__device__ inline void StoreElements(void* row, std::int64_t first,
                                     const Elements<E, count>& elements) {
  StoreBy<E, count>(row, first, elements, [](auto* p, const auto& unit) { *p = unit; });
}

// As StoreToRow.
template <typename E, int count>
__device__ inline void StoreElementsToRow(void* row, std::int64_t first,
                                          const Elements<E, count>& elements) {
  StoreBy<E, count>(row, first, elements,
                    [](auto* p, const auto& unit) { StoreToRow(p, unit); });
}

// What E's functions of these names do, by the GPU's own instructions where it has any.
// They agree but for the payloads of NaNs.

template <typename E>
__device__ inline typename E::Sum Load(typename E::Storage x) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<E, BF16>) return ptx::WidenBF16(x);
  if constexpr (std::is_same_v<E, F16>) return ptx::WidenF16(x);
#endif
  return E::Load(x);
}

template <typename E>
__device__ inline typename E::Storage Round(typename E::Sum x) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<E, BF16>) return ptx::RoundToBF16(x);
  if constexpr (std::is_same_v<E, F16>) return ptx::RoundToF16(x);
#endif
  return E::Round(x);
}

template <typename E>
__device__ inline typename E::Sum RoundSum(typename E::Sum x) {
  return Load<E>(Round<E>(x));
}

__device__ inline float Fma(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double Fma(double a, double b, double c) { return fma(a, b, c); }

// Calls visit(element type, elements in a load) for rows of `hidden` elements: in steps
// of 16 bytes, or of at least 4 where they consist of such.
template <typename Visit>
auto VisitElements(DType dtype, std::int64_t hidden, Visit visit) {
  const auto with = [&]<typename E>(E e) {
    if (hidden % kVector<E> == 0) {
      return visit(e, std::integral_constant<int, kVector<E>>());
    }
    if constexpr (sizeof(typename E::Storage) == 2) {
      if (hidden % 2 == 0) return visit(e, std::integral_constant<int, 2>());
    }
    return visit(e, std::integral_constant<int, 1>());
  };
  switch (dtype) {
    case DType::kBF16:
      return with(BF16());
    case DType::kF16:
      return with(F16());
    case DType::kF32:
      return with(F32());
    case DType::kF64:
      break;
  }
  return with(F64());
}

}  // namespace jax_ep::cuda

#endif  // JAX_EP_FFI_CUDA_ELEMENTS_H_
