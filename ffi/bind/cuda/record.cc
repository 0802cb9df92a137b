// What Python asks, by ctypes, of what is recorded of streams.
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <thread>

#include "cuda/stamp.h"
#include "fabric/gpus/gpu_clock.h"
#include "fabric/gpus/stream_points.h"
#include "fabric/gpus/stream_times.h"

extern "C" {

std::int64_t jax_ep_max_stream_times() { return jax_ep::kMaxStreamTimes; }

// How many streams have been timed until now, in one exchange each.
std::int64_t jax_ep_num_stream_times() {
  return static_cast<std::int64_t>(jax_ep::NumStreamTimes());
}

// Copies the times from number `from` on that are whole and still there; returns how
// many.
std::int64_t jax_ep_read_stream_times(std::int64_t from, jax_ep::StreamTimes* room,
                                      std::int64_t count) {
  return static_cast<std::int64_t>(jax_ep::ReadStreamTimes(
      static_cast<std::uint64_t>(from), {room, static_cast<std::size_t>(count)}));
}

// Reads the clocks of the devices on which exchanges have been; returns how many could
// be read.
std::int64_t jax_ep_read_gpu_clocks(jax_ep::ClockReading* room, std::int64_t count) {
  std::int64_t num_read = 0;
  // Which device is current belongs to a thread: the caller's stays as it is.
  std::thread([&] {
    for (const int device : jax_ep::DevicesWithPoints()) {
      if (num_read == count) break;
      if (jax_ep::ReadClock(device, jax_ep::cuda::Stamp, room[num_read]) ==
          cudaSuccess) {
        ++num_read;
      }
    }
  }).join();
  return num_read;
}

}  // extern "C"
