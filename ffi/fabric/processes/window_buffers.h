// How the buffers that the ranks of an exchange lend get into a process's window, and
// how the others find them there. Used by channels.

#ifndef JAX_EP_FFI_FABRIC_PROCESSES_WINDOW_BUFFERS_H_
#define JAX_EP_FFI_FABRIC_PROCESSES_WINDOW_BUFFERS_H_

#include <cstdint>
#include <vector>

#include "common/work.h"
#include "fabric/processes/window.h"
#include "fabric/threads/meeting.h"

namespace jax_ep {

// Returns the works that copy what the ranks of this process lend into its window.
std::vector<Work> PublicationWorks(const Meeting& meeting, const HalfLayout& layout,
                                   char* window);

// Tells the kernels where the ranks of another process have their buffers.
void FindBuffers(Meeting& meeting, const HalfLayout& layout, const char* window,
                 std::int32_t process);

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_PROCESSES_WINDOW_BUFFERS_H_
