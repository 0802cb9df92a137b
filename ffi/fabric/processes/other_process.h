// Another process of the job: its board, and whether it still runs.
// Opened by hosts; used by those who connect channels.

#ifndef JAX_EP_FFI_FABRIC_PROCESSES_OTHER_PROCESS_H_
#define JAX_EP_FFI_FABRIC_PROCESSES_OTHER_PROCESS_H_

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <string>
#include <variant>

#include "fabric/processes/board.h"
#include "fabric/processes/process_words.h"
#include "fabric/processes/shared_file.h"

namespace jax_ep {

class OtherProcess {
 public:
  // Opens its board, or says why it cannot. It is number `index` of the job.
  static std::variant<std::unique_ptr<OtherProcess>, std::string> Open(
      std::int32_t index, BoardAddress address);
  ~OtherProcess();
  OtherProcess(const OtherProcess&) = delete;
  OtherProcess& operator=(const OtherProcess&) = delete;

  const Board& board() const { return *board_; }
  std::int32_t index() const { return index_; }
  pid_t process() const { return process_; }
  // "process 1 (pid 77)"
  std::string name() const;
  bool alive() const;

  // Its words for the channel with this key, or null.
  const ProcessWords* Find(std::uint64_t key) const {
    return FindKey(board_->words, key);
  }

 private:
  OtherProcess(std::int32_t index, pid_t process) : index_(index), process_(process) {}

  const std::int32_t index_;
  const pid_t process_;
  std::unique_ptr<SharedFile> file_;
  const Board* board_ = nullptr;
  int handle_ = -1;
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_PROCESSES_OTHER_PROCESS_H_
