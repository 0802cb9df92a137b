// What a rank says of its call when it first runs it together with other processes.
#ifndef JAX_EP_FFI_BIND_CPU_FIRST_RUN_H_
#define JAX_EP_FFI_BIND_CPU_FIRST_RUN_H_

#include <cstdint>

#include "bind/call_reader.h"
#include "bind/process/call_site.h"
#include "fabric/processes/first_runs.h"

namespace jax_ep {

// What tells one kind of call from another, in all processes alike.
FirstRun DescribeRun(CallReader& reader, const Group& group, std::int64_t run_id);

}  // namespace jax_ep

#endif  // JAX_EP_FFI_BIND_CPU_FIRST_RUN_H_
