// Implements window_buffers.h.

#include "fabric/processes/window_buffers.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <vector>

#include "common/work.h"
#include "fabric/processes/window.h"
#include "fabric/threads/meeting.h"

namespace jax_ep {

std::vector<Work> PublicationWorks(const Meeting& meeting, const HalfLayout& layout,
                                   char* window) {
  std::vector<Work> works;
  std::vector<void*> places(meeting.shared_bytes.size());
  std::size_t index = 0;  // of the rank among those of this process
  for (const MakePublication& publication : meeting.publications) {
    if (publication == nullptr) continue;
    for (std::size_t lent = 0; lent < places.size(); ++lent) {
      places[lent] = layout.Place(window, index, lent);
    }
    std::ranges::copy(publication(places), std::back_inserter(works));
    ++index;
  }
  return works;
}

void FindBuffers(Meeting& meeting, const HalfLayout& layout, const char* window,
                 std::int32_t process) {
  const std::vector<std::int32_t>& process_of = meeting.span->process_of;
  std::size_t index = 0;  // of the rank among those of that process
  for (std::size_t rank = 0; rank < process_of.size(); ++rank) {
    if (process_of[rank] != process) continue;
    for (std::size_t lent = 0; lent < meeting.shared_bytes.size(); ++lent) {
      meeting.SetBuffer(lent, rank, layout.Place(window, index, lent));
    }
    ++index;
  }
}

}  // namespace jax_ep
