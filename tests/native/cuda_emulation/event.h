// Events of emulated streams, in memory that other processes can map. Used by
// streams.cc.
#ifndef JAX_EP_TESTS_NATIVE_CUDA_EMULATION_EVENT_H_
#define JAX_EP_TESTS_NATIVE_CUDA_EMULATION_EVENT_H_

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "streams.h"

namespace jax_ep::emulation {

// A mapping of a file in memory, of this process or of another one.
class Mapping {
 public:
  // A new file, or one of another process; check `data` before use. One that is not
  // shared is copied by a fork, as all other memory is.
  Mapping(std::size_t bytes, bool is_shared) : bytes_(bytes) {
    if (!is_shared) {
      Map(MAP_PRIVATE | MAP_ANONYMOUS);
      return;
    }
    file_ = memfd_create("jax_ep_emulated", MFD_CLOEXEC);
    if (file_ < 0 || ftruncate(file_, static_cast<off_t>(bytes)) != 0) return;
    Map(MAP_SHARED);
  }
  explicit Mapping(const EmulatedIpcHandle& handle)
      : bytes_(static_cast<std::size_t>(handle.bytes)) {
    const std::string path = "/proc/" + std::to_string(handle.process) + "/fd/" +
                             std::to_string(handle.file);
    file_ = open(path.c_str(), O_RDWR | O_CLOEXEC);
    owner_ = static_cast<int>(syscall(SYS_pidfd_open, handle.process, 0));
    if (file_ >= 0) Map(MAP_SHARED);
  }
  ~Mapping() {
    if (data_ != nullptr) munmap(data_, bytes_);
    for (const int file : {file_, owner_}) {
      if (file >= 0) close(file);
    }
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  void* data() const { return data_; }
  bool is_shared() const { return file_ >= 0; }

  // Whether it is another process's, and that has ended.
  bool IsOrphaned() const {
    pollfd owner = {.fd = owner_, .events = POLLIN, .revents = 0};
    return owner_ >= 0 && poll(&owner, 1, 0) == 1;
  }

  EmulatedIpcHandle handle() const {
    return {
        .process = getpid(), .file = file_, .bytes = static_cast<std::int64_t>(bytes_)};
  }

 private:
  void Map(int flags) {
    void* mapped = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, flags, file_, 0);
    if (mapped != MAP_FAILED) data_ = mapped;
  }

  int file_ = -1;
  int owner_ = -1;  // the other process
  std::size_t bytes_;
  void* data_ = nullptr;
};

// How often an event has been put on a stream, and to which of these times a stream has
// come: not always in their order, if they are on several streams. Copies are of the
// same event, which lasts until streams are done with it.
class Event {
 public:
  explicit Event(std::shared_ptr<Mapping> mapping) : mapping_(std::move(mapping)) {}

  std::uint64_t Record() const { return words().recorded.fetch_add(1) + 1; }
  std::uint64_t recorded() const { return words().recorded.load(); }

  void Complete(std::uint64_t generation) const { Completed(generation) = generation; }

  // Another process may complete it, so this looks again and again. It fails once that
  // has ended: what a GPU does then, nobody has said; at worst it waits for good.
  cudaError_t Await(std::uint64_t generation) const {
    while (Completed(generation).load() < generation) {
      const bool is_orphaned = mapping_->IsOrphaned();
      if (is_orphaned && Completed(generation).load() < generation) {
        return cudaErrorLaunchFailure;
      }
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    return cudaSuccess;
  }

  const Mapping& mapping() const { return *mapping_; }

  // How many times it may be on streams at once.
  static constexpr std::uint64_t kMaxPending = 64;

  struct Words {
    std::atomic<std::uint64_t> recorded;
    std::array<std::atomic<std::uint64_t>, kMaxPending> completed;
  };

 private:
  std::atomic<std::uint64_t>& Completed(std::uint64_t generation) const {
    return words().completed[generation % kMaxPending];
  }
  Words& words() const { return *static_cast<Words*>(mapping_->data()); }

  std::shared_ptr<Mapping> mapping_;
};

}  // namespace jax_ep::emulation

#endif  // JAX_EP_TESTS_NATIVE_CUDA_EMULATION_EVENT_H_
