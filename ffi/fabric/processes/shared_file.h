// Memory that processes share.
// Used for boards and windows.

#ifndef JAX_EP_FFI_FABRIC_PROCESSES_SHARED_FILE_H_
#define JAX_EP_FFI_FABRIC_PROCESSES_SHARED_FILE_H_

#include <sys/types.h>

#include <cstddef>
#include <memory>
#include <string>
#include <variant>

namespace jax_ep {

// What the system says of its call that just failed: "mmap: Cannot allocate memory".
std::string SystemProblem(const std::string& call);

// Memory that processes of one user on one host share: a file without a name. It is
// found by those who know which process holds it under which number, and it is gone
// when the last process that has mapped it has ended, in whichever way.
class SharedFile {
 public:
  // Either gives the file or says why there is none.
  using OrFailure = std::variant<std::unique_ptr<SharedFile>, std::string>;

  // Makes an empty file, to be read and written.
  static OrFailure Create();

  // Opens the file that a process holds, to be read.
  static OrFailure OpenOf(pid_t process, int number);

  ~SharedFile();
  SharedFile(const SharedFile&) = delete;
  SharedFile& operator=(const SharedFile&) = delete;

  // The number under which this process holds the file.
  int number() const { return descriptor_; }

  // Returns the file's first `bytes`, mapped, or null and the problem if they cannot
  // be. Its maker makes the file grow to that size; until it has, others must not touch
  // what is not there. What it returned before may have moved.
  void* Map(std::size_t bytes, std::string& problem);

 private:
  SharedFile(int descriptor, bool writable)
      : descriptor_(descriptor), writable_(writable) {}

  const int descriptor_;
  const bool writable_;
  void* mapping_ = nullptr;
  std::size_t mapped_bytes_ = 0;
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_PROCESSES_SHARED_FILE_H_
