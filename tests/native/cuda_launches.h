// Checks that emulated kernels ran to their end, and wrote where they may.

#ifndef JAX_EP_TESTS_NATIVE_CUDA_LAUNCHES_H_
#define JAX_EP_TESTS_NATIVE_CUDA_LAUNCHES_H_

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"

namespace jax_ep {

// Notes a failure, with its reason, if a kernel did not run to its end.
inline bool CheckRan(cudaError_t error, const char* file, int line) {
  if (error == cudaSuccess) return true;
  NoteFailure(file, line,
              error == cudaErrorLaunchFailure ? emulation::Failure()
                                              : "CUDA error " + Show(+error));
  return false;
}

// What a kernel writes to: of any content at first, and with more behind it that must
// stay as it is.
template <typename T>
class Output {
 public:
  Output(std::int64_t size, std::mt19937_64& rng)
      : size_(static_cast<std::size_t>(size)), values_(size_ + kGuards) {
    for (T& value : values_) value = static_cast<T>(rng());
    behind_.assign(values_.end() - kGuards, values_.end());
  }

  T* data() { return values_.data(); }
  const T* data() const { return values_.data(); }
  std::size_t size() const { return size_; }
  bool IsIntactBehind() const {
    return std::equal(behind_.begin(), behind_.end(), values_.end() - kGuards);
  }

 private:
  static constexpr std::ptrdiff_t kGuards = 64;

  std::size_t size_;
  std::vector<T> values_;
  std::vector<T> behind_;
};

}  // namespace jax_ep

#define EP_CHECK_RAN(launch) ::jax_ep::CheckRan(launch, __FILE__, __LINE__)

#endif  // JAX_EP_TESTS_NATIVE_CUDA_LAUNCHES_H_
