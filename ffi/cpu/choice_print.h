// What plans' fingerprints are made of.

#ifndef JAX_EP_FFI_CPU_CHOICE_PRINT_H_
#define JAX_EP_FFI_CPU_CHOICE_PRINT_H_

#include <cstdint>

namespace jax_ep::cpu {

// A number of `count` choices at their places among those of all ranks, of which these
// begin at `first`. Those of several ranks add up to that of all.
inline std::uint64_t PrintOfChoices(const std::int32_t* choices, std::int64_t count,
                                    std::int64_t first) {
  auto position = static_cast<std::uint64_t>(first);
  std::uint64_t sum = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    // Mixed by itself, as a sum of products would not tell one exchange of neighbours
    // from another.
    std::uint64_t choice =
        position++ * 0x9e3779b97f4a7c15ULL + static_cast<std::uint64_t>(choices[i] + 2);
    choice = (choice ^ (choice >> 32)) * 0xff51afd7ed558ccdULL;
    sum += choice ^ (choice >> 29);
  }
  return sum;
}

}  // namespace jax_ep::cpu

#endif  // JAX_EP_FFI_CPU_CHOICE_PRINT_H_
