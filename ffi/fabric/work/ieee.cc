// Implements ieee.h.

#include "fabric/work/ieee.h"

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace jax_ep {
namespace {

#if defined(__x86_64__)
constexpr std::uint32_t kDefaultControl = 0x1f80;  // all exceptions masked, nearest

std::uint64_t ReadControl() { return _mm_getcsr(); }
void WriteControl(std::uint64_t value) {
  _mm_setcsr(static_cast<std::uint32_t>(value));
}
#elif defined(__aarch64__)
constexpr std::uint64_t kDefaultControl = 0;

// GCC and clang have builtins for it, by different names.
std::uint64_t ReadControl() {
  std::uint64_t value;
  asm volatile("mrs %0, fpcr" : "=r"(value));
  return value;
}
void WriteControl(std::uint64_t value) { asm volatile("msr fpcr, %0" : : "r"(value)); }
#else
#error "jax_ep supports x86-64 and arm64"
#endif

}  // namespace

ScopedIeee::ScopedIeee() : saved_(ReadControl()) { WriteControl(kDefaultControl); }

ScopedIeee::~ScopedIeee() { WriteControl(saved_); }

}  // namespace jax_ep
