// How the processes of a channel find each other's words and windows by their boards.
// Used by hosts, for channels.

#ifndef JAX_EP_FFI_FABRIC_PROCESSES_CONNECT_H_
#define JAX_EP_FFI_FABRIC_PROCESSES_CONNECT_H_

#include <cstdint>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "fabric/processes/board.h"
#include "fabric/processes/neighbor.h"
#include "fabric/processes/other_process.h"
#include "fabric/processes/process_words.h"

namespace jax_ep {

// Shows unused words of this process's board, with a window, as those of the channel
// with this key. Words without a window say only that this process gave up, and are
// there so that the others need not wait for it.
std::variant<std::unique_ptr<Showcase>, std::string> ShowChannel(Board& board,
                                                                 ProcessWords& words,
                                                                 std::uint64_t key);

// Waits until all others show theirs, and opens the windows that their words name; or
// says why it does not.
std::variant<Neighbors, std::string> ConnectTo(std::vector<const OtherProcess*> others,
                                               std::uint64_t key,
                                               Clock::time_point deadline,
                                               const Interruption& interruption);

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_PROCESSES_CONNECT_H_
