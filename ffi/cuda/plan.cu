// Runs the kernels of a plan, each from a plan_*.cu of its own, one after the other, or
// the one that is all of them.

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
  if (FitsOneBlock(tables)) return MakeInOneBlock(tables, stream);
  const auto run = [&](auto... kernels) {
    cudaError_t error = cudaSuccess;
    (void)((error = kernels(tables, stream), error == cudaSuccess) && ...);
    return error;
  };
  return tables.MayOverflow() ? run(CountAsked, FindCutoffs, CountKept, LayOut, Place)
                              : run(CountAsked, LayOut, Place);
}

}  // namespace jax_ep::cuda
