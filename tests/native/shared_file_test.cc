// Memory that processes share, and what becomes of it when they end.
#include "fabric/processes/shared_file.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <variant>

#include "check.h"

namespace jax_ep {
namespace {

constexpr std::size_t kLarge = std::size_t{5} << 20;

using FilePointer = std::unique_ptr<SharedFile>;

FilePointer FileOf(SharedFile::OrFailure file) {
  if (auto* failure = std::get_if<std::string>(&file)) {
    EP_CHECK_EQ(*failure, "");
    return nullptr;
  }
  return std::move(std::get<FilePointer>(file));
}

std::string ProblemOf(const SharedFile::OrFailure& file) {
  const auto* problem = std::get_if<std::string>(&file);
  return problem == nullptr ? "" : *problem;
}

FilePointer Create() { return FileOf(SharedFile::Create()); }
FilePointer Open(pid_t process, int number) {
  return FileOf(SharedFile::OpenOf(process, number));
}

char* Map(SharedFile& file, std::size_t bytes) {
  std::string problem;
  auto* data = static_cast<char*>(file.Map(bytes, problem));
  EP_CHECK(data != nullptr);
  EP_CHECK_EQ(problem, "");
  return data;
}

EP_TEST(ReaderSeesWhatItsMakerWrites) {
  const FilePointer file = Create();
  char* written = Map(*file, 100);
  written[99] = 'a';
  const FilePointer reader = Open(getpid(), file->number());
  EP_CHECK(reader->number() != file->number());
  const char* read = Map(*reader, 100);
  EP_CHECK(read != written);
  EP_CHECK_EQ(read[99], 'a');
  EP_CHECK_EQ(read[98], '\0');
  written[98] = 'b';
  EP_CHECK_EQ(read[98], 'b');
}

EP_TEST(ReaderSeesTheFileGrow) {
  const FilePointer file = Create();
  Map(*file, 8)[7] = 'a';
  const FilePointer reader = Open(getpid(), file->number());
  EP_CHECK_EQ(Map(*reader, 8)[7], 'a');
  for (std::size_t bytes = 1000; bytes < 4 * kLarge; bytes = bytes * 7 / 2) {
    char* written = Map(*file, bytes);
    written[bytes - 1] = static_cast<char>('b' + bytes % 5);
    const char* read = Map(*reader, bytes);
    EP_CHECK_EQ(read[bytes - 1], static_cast<char>('b' + bytes % 5));
    EP_CHECK_EQ(read[7], 'a');  // and keeps what it held
  }
}

// It may be mapped by a reader before its maker has made it grow.
EP_TEST(ReaderMayMapFirst) {
  const FilePointer file = Create();
  const FilePointer reader = Open(getpid(), file->number());
  const char* read = Map(*reader, kLarge);
  Map(*file, kLarge)[kLarge - 1] = 'z';
  EP_CHECK_EQ(read[kLarge - 1], 'z');
}

EP_TEST(WhatIsMappedStaysWhereItIs) {
  const FilePointer file = Create();
  const char* data = Map(*file, kLarge);
  for (const std::size_t bytes : {std::size_t{0}, std::size_t{1}, kLarge / 2, kLarge}) {
    EP_CHECK(Map(*file, bytes) == data);
  }
}

EP_TEST(FileIsItsUsersOnlyAndHasNoName) {
  const FilePointer file = Create();
  Map(*file, 1);
  struct stat status = {};
  EP_CHECK_EQ(fstat(file->number(), &status), 0);
  EP_CHECK_EQ(status.st_mode & 0777, 0600);
  EP_CHECK_EQ(status.st_uid, getuid());
  EP_CHECK_EQ(status.st_nlink, 0);
  EP_CHECK(S_ISREG(status.st_mode));
}

EP_TEST(FilesAreNotInherited) {
  const FilePointer file = Create();
  const FilePointer reader = Open(getpid(), file->number());
  for (const int number : {file->number(), reader->number()}) {
    EP_CHECK((fcntl(number, F_GETFD) & FD_CLOEXEC) != 0);
  }
}

EP_TEST(ReadersCannotWrite) {
  const FilePointer file = Create();
  Map(*file, 1);
  const FilePointer reader = Open(getpid(), file->number());
  EP_CHECK_EQ(fcntl(reader->number(), F_GETFL) & O_ACCMODE, O_RDONLY);
  EP_CHECK(write(reader->number(), "x", 1) < 0);
}

// Or a reader would be killed by what it reads.
EP_TEST(FileIsNeverCutShort) {
  const FilePointer file = Create();
  Map(*file, kLarge);
  EP_CHECK(ftruncate(file->number(), 1) != 0);
  EP_CHECK_EQ(errno, EPERM);
}

EP_TEST(FileIsClosedWithItsOwner) {
  FilePointer file = Create();
  const int number = file->number();
  FilePointer reader = Open(getpid(), number);
  Map(*reader, 1);
  const int read_number = reader->number();
  file.reset();
  EP_CHECK(fcntl(number, F_GETFD) < 0);
  reader.reset();
  EP_CHECK(fcntl(read_number, F_GETFD) < 0);
}

EP_TEST(FileThatIsNotThereIsReported) {
  FilePointer file = Create();
  const int number = file->number();
  file.reset();
  const auto closed = SharedFile::OpenOf(getpid(), number);
  EP_CHECK_EQ(ProblemOf(closed), "open /proc/" + std::to_string(getpid()) + "/fd/" +
                                     std::to_string(number) +
                                     ": No such file or directory");
}

// What the system says when there is more to map than it lets a process have.
EP_TEST(MemoryThatCannotBeHadIsReported) {
  const FilePointer file = Create();
  std::string problem;
  EP_CHECK(file->Map(std::size_t{1} << 62, problem) == nullptr);
  EP_CHECK_EQ(problem, "mmap: Cannot allocate memory");
}

EP_TEST(FileThatMayNotGrowIsReported) {
  const FilePointer file = Create();
  const char* before = Map(*file, 1);
  EP_CHECK_EQ(fcntl(file->number(), F_ADD_SEALS, F_SEAL_GROW), 0);
  std::string problem;
  EP_CHECK(file->Map(kLarge, problem) == nullptr);
  EP_CHECK_EQ(problem, "ftruncate: Operation not permitted");
  EP_CHECK(Map(*file, 1) == before);
}

// As many as the process may have open: neither a file of its own nor another's.
EP_TEST(FilesThatCannotBeOpenedAreReported) {
  const FilePointer file = Create();
  rlimit limit{};
  EP_CHECK_EQ(getrlimit(RLIMIT_NOFILE, &limit), 0);
  const rlimit none = {.rlim_cur = 0, .rlim_max = limit.rlim_max};
  EP_CHECK_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
  const auto made = SharedFile::Create();
  const auto opened = SharedFile::OpenOf(getpid(), file->number());
  EP_CHECK_EQ(setrlimit(RLIMIT_NOFILE, &limit), 0);
  EP_CHECK_EQ(ProblemOf(made), "memfd_create: Too many open files");
  EP_CHECK_EQ(ProblemOf(opened), "open /proc/" + std::to_string(getpid()) + "/fd/" +
                                     std::to_string(file->number()) +
                                     ": Too many open files");
}

// A process that makes a file, writes to it and waits for its end.
class Writer {
 public:
  Writer() {
    std::array<int, 2> ends{};
    EP_CHECK_EQ(pipe(ends.data()), 0);
    process_ = fork();
    if (process_ == 0) Run(ends[1]);
    close(ends[1]);
    EP_CHECK_EQ(read(ends[0], &number_, sizeof(number_)),
                static_cast<ssize_t>(sizeof(number_)));
    close(ends[0]);
  }
  ~Writer() {
    if (process_ > 0) Kill();
  }
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;

  void Kill() {
    kill(process_, SIGKILL);
    waitpid(process_, nullptr, 0);
    process_ = -1;
  }
  pid_t process() const { return process_; }
  int number() const { return number_; }

 private:
  [[noreturn]] static void Run(int to) {
    const FilePointer file = Create();
    const std::string text = "from a child";
    text.copy(Map(*file, kLarge) + kLarge - 16, text.size());
    const int number = file->number();
    if (write(to, &number, sizeof(number)) < 0) _exit(1);
    for (;;) pause();
  }

  pid_t process_ = -1;
  int number_ = -1;
};

EP_TEST(OtherProcessesFindTheFile) {
  const Writer writer;
  const FilePointer reader = Open(writer.process(), writer.number());
  EP_CHECK_EQ(std::string(Map(*reader, kLarge) + kLarge - 16), "from a child");
}

EP_TEST(ChildReadsWhatItsParentWrites) {
  const FilePointer file = Create();
  Map(*file, kLarge)[kLarge - 1] = 'p';
  const pid_t parent = getpid();
  const pid_t child = fork();
  if (child == 0) {
    const FilePointer reader = Open(parent, file->number());
    _exit(reader != nullptr && Map(*reader, kLarge)[kLarge - 1] == 'p' ? 0 : 1);
  }
  int status = -1;
  EP_CHECK_EQ(waitpid(child, &status, 0), child);
  EP_CHECK_EQ(status, 0);
}

// What is mapped outlives its maker, and nobody finds it any more.
EP_TEST(FileOutlivesItsKilledMaker) {
  Writer writer;
  const pid_t process = writer.process();
  const FilePointer reader = Open(process, writer.number());
  writer.Kill();
  EP_CHECK_EQ(std::string(Map(*reader, kLarge) + kLarge - 16), "from a child");
  const auto gone = SharedFile::OpenOf(process, writer.number());
  EP_CHECK(std::holds_alternative<std::string>(gone));
}

}  // namespace
}  // namespace jax_ep
