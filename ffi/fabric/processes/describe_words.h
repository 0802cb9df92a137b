#ifndef JAX_EP_FFI_FABRIC_PROCESSES_DESCRIBE_WORDS_H_
#define JAX_EP_FFI_FABRIC_PROCESSES_DESCRIBE_WORDS_H_

#include <string>

#include "fabric/processes/process_words.h"

namespace jax_ep {

// The words of processes, for errors.

std::string Describe(const SharedPrint& print);

// What may be all that differs between two prints; empty if it does not.
std::string DescribeSizes(const SharedPrint& one, const SharedPrint& other);

// What a process in this phase is doing, after "process 1".
const char* Doing(Phase phase);

// "pulling, in epoch 5"
std::string LastSeen(const ProcessWords& words);

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_PROCESSES_DESCRIBE_WORDS_H_
