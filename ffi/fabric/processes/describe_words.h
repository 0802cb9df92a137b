// The words of processes, put into words for errors.
// Used by the errors of channels.

#ifndef JAX_EP_FFI_FABRIC_PROCESSES_DESCRIBE_WORDS_H_
#define JAX_EP_FFI_FABRIC_PROCESSES_DESCRIBE_WORDS_H_

#include <string>

#include "fabric/processes/process_words.h"

namespace jax_ep {

// What a process in this phase is doing, after "process 1".
const char* Doing(Phase phase);

// "pulling, in epoch 5"
std::string LastSeen(const ProcessWords& words);

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_PROCESSES_DESCRIBE_WORDS_H_
