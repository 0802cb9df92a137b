// What Python asks of the library for CPUs besides what all libraries tell, by ctypes.
#include "cpu/row_math.h"

extern "C" {

const char* jax_ep_instruction_set() {
  return jax_ep::cpu::BestRowMath().instruction_set;
}

}  // extern "C"
