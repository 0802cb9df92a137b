// Memory of a GPU that the GPUs of other processes read, and the events by which their
// streams know when. Used by exchanges that span processes of one host.

#ifndef JAX_EP_FFI_FABRIC_GPUS_DEVICE_WINDOW_H_
#define JAX_EP_FFI_FABRIC_GPUS_DEVICE_WINDOW_H_

#include <cuda_runtime.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

#include "fabric/processes/window.h"
#include "fabric/threads/attendance.h"

namespace jax_ep {

// What a rank tells others of its window in one exchange, through memory of the host.
struct WindowNote {
  cudaIpcMemHandle_t memory;
  cudaIpcEventHandle_t ready;   // recorded when the half is filled
  cudaIpcEventHandle_t done;    // recorded when the rank has read the others' halves
  std::uint64_t memory_number;  // of the half: grows when it gets other memory
};

// One rank's window in the exchanges of one channel, with two halves that take turns,
// and what it has opened of the others'. Only the thread that launches what the rank's
// GPU does may use it, with the GPU current.
//
// A half is filled again two exchanges later. In the one in between, this rank's stream
// waits until all others have filled their halves, which they do behind their reading
// of this one: so nobody reads it any more when the stream comes to fill it again, and
// nobody has to say so.
class DeviceWindow {
 public:
  DeviceWindow() = default;
  DeviceWindow(const DeviceWindow&) = delete;
  DeviceWindow& operator=(const DeviceWindow&) = delete;

  // Where a half has what its one rank lends.
  static HalfLayout LayoutOf(const std::vector<Lent>& lent);

  // Makes room for what is lent in the next half, and says where: null for what is not
  // shared.
  cudaError_t MakeRoom(const std::vector<Lent>& lent, std::vector<void*>& places);

  // Puts copies of what is lent at these places, but for what lies there, and fills in
  // the note for the others.
  cudaError_t Publish(const std::vector<Lent>& lent, const std::vector<void*>& places,
                      cudaStream_t stream, WindowNote& note);

  // Has the stream wait until another rank has filled its half; returns where that is.
  cudaError_t AwaitReady(std::int32_t rank, const WindowNote& note, cudaStream_t stream,
                         const char*& half);

  // Ends the exchange, for which all have come.
  void Advance() { ++num_exchanges_; }

 private:
  struct Half {
    void* memory = nullptr;
    std::size_t bytes = 0;
    std::uint64_t number = 0;  // of memories that it has had
    cudaEvent_t ready = nullptr;
    WindowNote note = {};
  };

  // Another rank's half, as it was opened here.
  struct Opened {
    const void* memory = nullptr;
    std::uint64_t number = 0;
    cudaEvent_t ready = nullptr;
  };

  Half& Current() { return halves_[num_exchanges_ % halves_.size()]; }
  static cudaError_t MakeEvent(Half& half);
  static cudaError_t Reserve(Half& half, std::size_t bytes);
  static cudaError_t Open(const WindowNote& note, Opened& opened);

  std::uint64_t num_exchanges_ = 0;
  std::array<Half, 2> halves_;
  std::map<std::int32_t, std::array<Opened, 2>> opened_;  // by rank
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_GPUS_DEVICE_WINDOW_H_
