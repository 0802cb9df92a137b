// Which core a thread runs on, and how it gets off it.
// Used where threads that work together should not share one.

#ifndef JAX_EP_FFI_FABRIC_WORK_CORES_H_
#define JAX_EP_FFI_FABRIC_WORK_CORES_H_

namespace jax_ep {

// Returns the core that this thread runs on, or -1 where the system does not say.
int ThisCore();

// Moves this thread to another of the cores that it may use, if there is one, and if
// they have not just been found busy.
void LeaveCore();

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_WORK_CORES_H_
