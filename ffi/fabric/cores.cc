#include "fabric/cores.h"

#if defined(__linux__)
#include <sched.h>
#endif

namespace jax_ep {

#if defined(__linux__)

int ThisCore() { return sched_getcpu(); }

void LeaveCore() {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;
  cpu_set_t others = allowed;
  CPU_CLR(static_cast<unsigned>(ThisCore()), &others);
  if (CPU_COUNT(&others) == 0) return;
  // The first call moves it, the second leaves it free to go where it was.
  if (sched_setaffinity(0, sizeof(others), &others) != 0) return;
  sched_setaffinity(0, sizeof(allowed), &allowed);
}

#else

int ThisCore() { return -1; }

void LeaveCore() {}

#endif

}  // namespace jax_ep
