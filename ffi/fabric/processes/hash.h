#ifndef JAX_EP_FFI_FABRIC_PROCESSES_HASH_H_
#define JAX_EP_FFI_FABRIC_PROCESSES_HASH_H_

#include <cstdint>

namespace jax_ep {

// A digest of numbers that is the same in all processes: FNV-1a by words, with the high
// bits brought down. Begin with the seed.
inline constexpr std::uint64_t kHashSeed = 0xcbf29ce484222325ULL;

constexpr std::uint64_t Mix(std::uint64_t hash, std::int64_t number) {
  hash = (hash ^ static_cast<std::uint64_t>(number)) * 0x100000001b3ULL;
  return hash ^ (hash >> 29);
}

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_PROCESSES_HASH_H_
