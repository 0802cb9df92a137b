// Runs the kernels of a plan, each from a plan_*.cu of its own, one after the other.

#include <cstdint>

#include "cuda/plan.h"
#include "cuda/plan_tables.h"

namespace jax_ep::cuda {

std::int64_t PlanWorkspace(const PlanArgs& args) { return PlanTables::Words(args); }

cudaError_t MakePlans(const PlanArgs& args, const PlanArrays& first,
                      const PlanRanks& ranks, std::int32_t* workspace,
                      cudaStream_t stream) {
  if (args.num_ranks > kMaxRanks) return cudaErrorInvalidValue;
  const PlanTables tables(args, first, ranks, workspace);
  for (const auto kernel : {CountAsked, FindCutoffs, CountKept, LayOut, Place}) {
    if (const cudaError_t error = kernel(tables, stream); error != cudaSuccess) {
      return error;
    }
  }
  return cudaSuccess;
}

}  // namespace jax_ep::cuda
