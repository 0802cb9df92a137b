// The kernels for the CPU, op by op: the work that an exchange's call makes.
#ifndef JAX_EP_FFI_BIND_CPU_WORKS_H_
#define JAX_EP_FFI_BIND_CPU_WORKS_H_

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "bind/ops.h"
#include "common/work.h"
#include "cpu/plan_fault.h"
#include "fabric/work/work_share.h"
#include "xla/ffi/api/ffi.h"

namespace jax_ep {

// Makes plans on this thread.
void MakePlans(const PlanArgs& args);

// The works of a call whose lent buffers are in its tables. They read the call when
// they run: it must live until then.
std::vector<Work> WorksOf(const PlanOp::Call& call);
std::vector<Work> WorksOf(const PlannedCall<GatherRowsArgs>& call);
std::vector<Work> WorksOf(const PlannedCall<ReduceRowsArgs>& call);
std::vector<Work> WorksOf(const PlannedCall<RowDotsArgs>& call);

// Has a call's kernels note what is wrong with its plan, if they read one.
template <typename KernelArgs>
void NoteFaultsIn(cpu::PlanFault& fault, PlannedCall<KernelArgs>& call) {
  for (KernelArgs& args : call.kernels) args.fault = &fault;
}
inline void NoteFaultsIn(cpu::PlanFault&, PlanOp::Call&) {}

// What is wrong with a call whose plan had a fault, and the error that says so.
std::string SaysOf(const char* call, const cpu::PlanFault& fault);
ffi::Error BadPlan(const char* call, const cpu::PlanFault& fault);

Schedule ScheduleOn(ffi::ThreadPool& pool);

}  // namespace jax_ep

#endif  // JAX_EP_FFI_BIND_CPU_WORKS_H_
