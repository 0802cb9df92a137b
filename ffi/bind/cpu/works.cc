// Implements works.h.
#include "bind/cpu/works.h"

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/gather_rows.h"
#include "cpu/plan.h"
#include "cpu/reduce_rows.h"
#include "cpu/row_dots.h"

namespace jax_ep {
namespace {

void MakeAllPlans(const void* opaque, std::int64_t) {
  MakePlans(static_cast<const PlanOp::Call*>(opaque)->args);
}

template <typename KernelArgs, typename MakeWork>
std::vector<Work> WorksOfAll(const PlannedCall<KernelArgs>& call, MakeWork make) {
  std::vector<Work> works;
  works.reserve(call.kernels.size());
  for (const KernelArgs& args : call.kernels) works.push_back(make(args));
  return works;
}

}  // namespace

void MakePlans(const PlanArgs& args) {
  using Body = std::function<void(std::int64_t)>;
  cpu::RunPlan(args, [](std::int64_t count, const Body& body) {
    for (std::int64_t i = 0; i < count; ++i) body(i);
  });
}

// Less than waking a helper costs: one rank's work makes all plans, on one thread.
std::vector<Work> WorksOf(const PlanOp::Call& call) {
  return {{.args = &call, .run = MakeAllPlans, .num_chunks = call.makes_all ? 1 : 0}};
}

std::vector<Work> WorksOf(const PlannedCall<GatherRowsArgs>& call) {
  return WorksOfAll(call, cpu::GatherRowsWork);
}

std::vector<Work> WorksOf(const PlannedCall<ReduceRowsArgs>& call) {
  return WorksOfAll(call, cpu::ReduceRowsWork);
}

std::vector<Work> WorksOf(const PlannedCall<RowDotsArgs>& call) {
  return WorksOfAll(call, cpu::RowDotsWork);
}

std::string SaysOf(const char* call, const cpu::PlanFault& fault) {
  return std::string(call) + ": plan must be as make_plan made it: its " + fault.what();
}

ffi::Error BadPlan(const char* call, const cpu::PlanFault& fault) {
  return ffi::Error::InvalidArgument("jax_ep " + SaysOf(call, fault));
}

Schedule ScheduleOn(ffi::ThreadPool& pool) {
  return [&pool](std::function<void()> task) { pool.Schedule(std::move(task)); };
}

}  // namespace jax_ep
