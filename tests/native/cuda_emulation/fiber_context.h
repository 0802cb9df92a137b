// Where a fiber stands: its registers and its stack. For grids, whose threads are
// fibers of one thread of the host.

#ifndef JAX_EP_TESTS_NATIVE_CUDA_EMULATION_FIBER_CONTEXT_H_
#define JAX_EP_TESTS_NATIVE_CUDA_EMULATION_FIBER_CONTEXT_H_

#include <ucontext.h>

#include <csetjmp>
#include <cstddef>
#include <memory>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace jax_ep::emulation {

// A place to go on from. A new one stands where its first SwitchTo is called from; one
// that was made stands at the beginning of a function, on a stack of its own.
//
// Switching saves registers by setjmp where no sanitizer looks, as swapcontext makes
// two system calls, which take most of an emulated kernel's time.
class FiberContext {
 public:
  FiberContext() = default;
  ~FiberContext() { LeaveSanitizer(); }
  FiberContext(const FiberContext&) = delete;
  FiberContext& operator=(const FiberContext&) = delete;

  // `run` must not return.
  void Make(void (*run)()) {
    if (!stack_) stack_ = std::make_unique_for_overwrite<char[]>(kStackBytes);
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, run, 0);
    has_run_ = false;
    EnterSanitizer();
  }

  // Goes on at another place, until somebody switches back to this one.
  void SwitchTo(FiberContext& other);

 private:
  static constexpr std::size_t kStackBytes = 128 * 1024;

#if defined(__SANITIZE_THREAD__)
  void EnterSanitizer() {
    LeaveSanitizer();
    fiber_ = __tsan_create_fiber(0);
    owns_fiber_ = true;
  }
  void LeaveSanitizer() {
    if (owns_fiber_) __tsan_destroy_fiber(fiber_);
    owns_fiber_ = false;
  }
  void* fiber_ = nullptr;
  bool owns_fiber_ = false;
#else
  void EnterSanitizer() {}
  void LeaveSanitizer() {}
#endif

  ucontext_t context_ = {};
  std::jmp_buf registers_ = {};
  bool has_run_ = true;
  std::unique_ptr<char[]> stack_;
};

#if defined(__SANITIZE_THREAD__)

inline void FiberContext::SwitchTo(FiberContext& other) {
  if (fiber_ == nullptr) fiber_ = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(other.fiber_, 0);
  swapcontext(&context_, &other.context_);
}

#elif defined(__SANITIZE_ADDRESS__)

inline void FiberContext::SwitchTo(FiberContext& other) {
  swapcontext(&context_, &other.context_);
}

#else

inline void FiberContext::SwitchTo(FiberContext& other) {
  if (_setjmp(registers_) != 0) return;
  if (other.has_run_) _longjmp(other.registers_, 1);
  other.has_run_ = true;
  setcontext(&other.context_);
}

#endif

}  // namespace jax_ep::emulation

#endif  // JAX_EP_TESTS_NATIVE_CUDA_EMULATION_FIBER_CONTEXT_H_
