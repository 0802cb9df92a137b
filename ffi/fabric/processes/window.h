// Where things lie in the memory that a process shows to the others of a channel.
// Used by channels, of both the process that fills a window and those that read it.

#ifndef JAX_EP_FFI_FABRIC_PROCESSES_WINDOW_H_
#define JAX_EP_FFI_FABRIC_PROCESSES_WINDOW_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace jax_ep {

// One half of a window: the lent buffers of a process's ranks, one rank after the
// other, and of each rank one buffer after the other. All ranks lend the same sizes.
// Each buffer starts on a cache line of its own, so that threads which fill two of them
// write to no line together.
class HalfLayout {
 public:
  static constexpr std::size_t kAlignment = 64;  // a cache line of x86-64 and arm64

  // How much of each lent buffer is shared.
  explicit HalfLayout(const std::vector<std::int64_t>& shared_bytes) {
    offsets_.reserve(shared_bytes.size());
    for (const std::int64_t bytes : shared_bytes) {
      offsets_.push_back(bytes > 0 ? rank_bytes_ : kNotShared);
      rank_bytes_ += Aligned(static_cast<std::size_t>(bytes));
    }
  }

  // Of a process with so many ranks. Never 0, as no bytes cannot be mapped.
  std::size_t BytesOf(std::size_t num_ranks) const {
    return std::max(num_ranks * rank_bytes_, kAlignment);
  }

  // The place of a lent buffer of the process's rank number `index`, counted within the
  // process; null where none of it is shared.
  template <typename Byte>
  Byte* Place(Byte* half, std::size_t index, std::size_t lent) const {
    if (offsets_[lent] == kNotShared) return nullptr;
    return half + index * rank_bytes_ + offsets_[lent];
  }

 private:
  // In place of an offset, for a buffer of which nothing is shared: 0 is a true one.
  static constexpr std::size_t kNotShared = SIZE_MAX;

  static constexpr std::size_t Aligned(std::size_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }

  std::vector<std::size_t> offsets_;  // by lent buffer
  std::size_t rank_bytes_ = 0;
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_PROCESSES_WINDOW_H_
