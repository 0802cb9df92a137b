// Digests of numbers that all processes compute alike.
// Used for the keys of boards and for the prints of calls, and by ffi/bind/cpu.

#ifndef JAX_EP_FFI_FABRIC_PROCESSES_HASH_H_
#define JAX_EP_FFI_FABRIC_PROCESSES_HASH_H_

#include <cstdint>

namespace jax_ep {

// A digest of numbers that is the same in all processes: FNV-1a by words, with the high
// bits brought down. Begin with the seed, which is FNV's, as is the factor.
inline constexpr std::uint64_t kHashSeed = 0xcbf29ce484222325ULL;

constexpr std::uint64_t Mix(std::uint64_t hash, std::int64_t number) {
  hash = (hash ^ static_cast<std::uint64_t>(number)) * 0x100000001b3ULL;
  return hash ^ (hash >> 29);
}

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_PROCESSES_HASH_H_
