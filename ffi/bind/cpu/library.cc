// What Python asks of the library for CPUs besides what all libraries tell, by ctypes.
#include "bind/process/process.h"
#include "cpu/row_math.h"

// XLA:CPU runs what does not depend on each other in any order.
bool jax_ep::LaunchesInOrder() { return false; }

extern "C" {

const char* jax_ep_instruction_set() {
  return jax_ep::cpu::BestRowMath().instruction_set;
}

}  // extern "C"
