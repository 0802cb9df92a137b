// An exchange among GPUs of one process or of several on a host: their threads meet on
// the host, and events order what they put on their streams. Used by ffi/bind/cuda.

#ifndef JAX_EP_FFI_FABRIC_GPUS_STREAM_EXCHANGE_H_
#define JAX_EP_FFI_FABRIC_GPUS_STREAM_EXCHANGE_H_

#include <cuda_runtime.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "fabric/gpus/device_window.h"
#include "fabric/gpus/stream_times.h"
#include "fabric/threads/attendance.h"
#include "fabric/threads/meeting.h"

namespace jax_ep {

// One rank's call, on its GPU's stream.
struct StreamCall {
  // What its peers need to know to meet it, and what it lends them: addresses that
  // their GPUs can read. Without works, and nobody to tell.
  Attendance attendance;
  cudaStream_t stream;
  // Puts on the stream what makes what the rank lends, if it is not there yet: what has
  // no data yet at these places, by lent buffer, in the window.
  std::function<cudaError_t(const std::vector<void*>& places)> prepare = nullptr;
  // Puts the rank's kernels on the stream, given a table of all ranks' buffers for each
  // that is lent.
  std::function<cudaError_t(const PeerTables&)> launch;
  // Where ranks of other processes find what it lends; null if there are none. Then the
  // attendance has a span, whose relay carries out exchanges in the order in which the
  // ranks come to them.
  DeviceWindow* window = nullptr;
  // If calls are recorded: puts on the stream that it writes down what time it is.
  Stamp stamp = nullptr;
};

// What went wrong in an exchange.
struct StreamFailure {
  std::string what;
  bool is_of_cuda;  // and not of who came, or when
};

// Carries out one rank's part: it returns when all is on the rank's stream, so that
// what follows there comes after all ranks' reading. Called by the thread that launches
// what the GPU does, with the GPU current; it waits for the other GPUs' threads, no
// longer than the meeting point lets ranks wait. Until all have come nothing is put on
// any stream that waits for another, so that a rank that does not come is an error of
// this call alone, and every GPU goes on.
std::optional<StreamFailure> ExchangeOnStreams(MeetingPoint& point, StreamCall call);

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_GPUS_STREAM_EXCHANGE_H_
