// Implements shared_file.h.

#include "fabric/processes/shared_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <string>

namespace jax_ep {
namespace {

// Files grow by multiples of a huge page, so that the system may map whole ones.
constexpr std::size_t kGranule = std::size_t{2} << 20;

}  // namespace

std::string SystemProblem(const std::string& call) {
  return call + ": " + std::strerror(errno);
}

SharedFile::OrFailure SharedFile::Create() {
#if defined(__linux__)
  const int descriptor = memfd_create("jax_ep", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (descriptor < 0) return SystemProblem("memfd_create");
  std::unique_ptr<SharedFile> file(new SharedFile(descriptor, true));
  // Nobody else's, and never cut short under a reader.
  if (fchmod(descriptor, S_IRUSR | S_IWUSR) != 0) return SystemProblem("fchmod");
  if (fcntl(descriptor, F_ADD_SEALS, F_SEAL_SHRINK) != 0)
    return SystemProblem("F_ADD_SEALS");
  return file;
#else
  return "memory is shared between processes on Linux only";
#endif
}

SharedFile::OrFailure SharedFile::OpenOf(pid_t process, int number) {
  const std::string path =
      "/proc/" + std::to_string(process) + "/fd/" + std::to_string(number);
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) return SystemProblem("open " + path);
  return std::unique_ptr<SharedFile>(new SharedFile(descriptor, false));
}

SharedFile::~SharedFile() {
  if (mapping_ != nullptr) munmap(mapping_, mapped_bytes_);
  close(descriptor_);
}

void* SharedFile::Map(std::size_t bytes, std::string& problem) {
  if (bytes <= mapped_bytes_) return mapping_;
  // By more than is asked for, as sizes that creep up would have it mapped every time.
  const std::size_t enough =
      (std::max(bytes, mapped_bytes_ + mapped_bytes_ / 2) + kGranule - 1) / kGranule *
      kGranule;
  if (writable_ && ftruncate(descriptor_, static_cast<off_t>(enough)) != 0) {
    problem = SystemProblem("ftruncate");
    return nullptr;
  }
  const int protection = writable_ ? PROT_READ | PROT_WRITE : PROT_READ;
  void* mapping = mmap(nullptr, enough, protection, MAP_SHARED, descriptor_, 0);
  if (mapping == MAP_FAILED) {
    problem = SystemProblem("mmap");
    return nullptr;
  }
#if defined(MADV_HUGEPAGE)
  madvise(mapping, enough, MADV_HUGEPAGE);
#endif
  if (mapping_ != nullptr) munmap(mapping_, mapped_bytes_);
  mapping_ = mapping;
  mapped_bytes_ = enough;
  return mapping_;
}

}  // namespace jax_ep
