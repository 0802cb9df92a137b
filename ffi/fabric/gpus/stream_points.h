// The two points of an exchange on a GPU's stream, which its peers' streams wait for.
// Used by the fabrics of several GPUs.

#ifndef JAX_EP_FFI_FABRIC_GPUS_STREAM_POINTS_H_
#define JAX_EP_FFI_FABRIC_GPUS_STREAM_POINTS_H_

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <vector>

#include "fabric/gpus/signal.h"

namespace jax_ep {

// One rank's, in one exchange. Streams wait for what has been recorded on the host
// before: so peers look at `ready` once all have come, and at `done` once `recorded`
// says so.
struct StreamPoints {
  cudaEvent_t ready = nullptr;  // what the rank lends is there
  cudaEvent_t done = nullptr;   // it has read what its peers lend

  // Whether `done` has been recorded, or will not be.
  Signal recorded;
  static constexpr std::uint32_t kYes = 1;
  static constexpr std::uint32_t kNever = 2;

  int device = 0;
  std::atomic<std::int32_t> num_users = 0;
};

// Takes a pair of events of the current device, for so many ranks to use. Null, and the
// error, if CUDA has none.
StreamPoints* TakeStreamPoints(std::int32_t num_users, cudaError_t& error);

// Says that one of the ranks will not look at them again. The last one's word lets
// another exchange have them; those of an exchange that failed, in which some rank did
// not come so far, are nobody's from then on: a few hundred bytes.
void ReleaseStreamPoints(StreamPoints* points);

// The devices on which exchanges have been.
std::vector<int> DevicesWithPoints();

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_GPUS_STREAM_POINTS_H_
