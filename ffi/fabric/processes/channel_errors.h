// The words in which a channel's errors say what went wrong, where and for whom.
// Used by channels alone.

#ifndef JAX_EP_FFI_FABRIC_PROCESSES_CHANNEL_ERRORS_H_
#define JAX_EP_FFI_FABRIC_PROCESSES_CHANNEL_ERRORS_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "fabric/processes/neighbor.h"
#include "fabric/processes/process_words.h"
#include "fabric/processes/shared_print.h"
#include "fabric/threads/attendance.h"

namespace jax_ep {

// How far a process is in a channel's exchanges.
struct Standing {
  const std::vector<std::int32_t>& process_of;  // by rank
  std::int32_t here;                            // the process
  Epoch epoch;
  Phase phase;
  std::chrono::duration<double> timeout;
};

// "in epoch 5 process 0 was pulling and …", in which `problem` goes on
std::string Trouble(const Standing& at, const std::string& problem);

// A neighbor has ended, or given up, or by the deadline has not done `what`,
// "published".
std::string NeighborTrouble(const Standing& at, const Neighbors& neighbors,
                            const Neighbor& neighbor, const char* what);

// The leader has named an exchange that the ranks of this process did not come to: they
// came to `instead`.
std::string OtherCallTrouble(const Standing& at, const ExchangeName& named,
                             const CallPrint& instead);

// The ranks of this process and of `process` make different calls.
std::string MismatchTrouble(const Standing& at, const SharedPrint& own,
                            std::int32_t process, const SharedPrint& theirs);

// Memory that could not be had: to publish in, and to read from.
std::string OwnWindowTrouble(const Standing& at, std::size_t bytes,
                             const std::string& problem);
std::string WindowTrouble(const Standing& at, std::int32_t process,
                          const std::string& problem);

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_PROCESSES_CHANNEL_ERRORS_H_
