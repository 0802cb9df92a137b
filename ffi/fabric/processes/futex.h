// How a process wakes others up that wait for a change in memory they share.
// Used by channels and by those who connect them.

#ifndef JAX_EP_FFI_FABRIC_PROCESSES_FUTEX_H_
#define JAX_EP_FFI_FABRIC_PROCESSES_FUTEX_H_

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <atomic>
#include <chrono>
#include <cstdint>

namespace jax_ep {

// Between two looks at a word, by a thread that does not sleep.
inline void Pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// A word that counts the changes of something in memory that processes share. Its
// writer rings it after each change; readers sleep on it until it is rung.
using Bell = std::atomic<std::uint32_t>;

void Ring(Bell& bell);

// Returns when the bell no longer shows `seen`, after `longest`, or for no reason.
void AwaitRing(const Bell& bell, std::uint32_t seen, std::chrono::nanoseconds longest);

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_PROCESSES_FUTEX_H_
