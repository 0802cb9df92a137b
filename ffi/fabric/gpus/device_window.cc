// Implements device_window.h.

#include "fabric/gpus/device_window.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "fabric/processes/window.h"

namespace jax_ep {

HalfLayout DeviceWindow::LayoutOf(const std::vector<Lent>& lent) {
  std::vector<std::int64_t> sizes;
  sizes.reserve(lent.size());
  for (const Lent& buffer : lent) sizes.push_back(buffer.shared_bytes);
  return HalfLayout(sizes);
}

cudaError_t DeviceWindow::MakeRoom(const std::vector<Lent>& lent,
                                   std::vector<void*>& places) {
  Half& half = Current();
  const HalfLayout layout = LayoutOf(lent);
  cudaError_t error = MakeEvent(half);
  if (error == cudaSuccess) error = Reserve(half, layout.BytesOf(1));
  for (std::size_t i = 0; i < lent.size() && error == cudaSuccess; ++i) {
    places.push_back(layout.Place(static_cast<char*>(half.memory), 0, i));
  }
  return error;
}

cudaError_t DeviceWindow::Publish(const std::vector<Lent>& lent,
                                  const std::vector<void*>& places, cudaStream_t stream,
                                  WindowNote& note) {
  cudaError_t error = cudaSuccess;
  for (std::size_t i = 0; i < lent.size() && error == cudaSuccess; ++i) {
    void* place = places[i];
    if (place == nullptr || place == lent[i].data) continue;
    error = cudaMemcpyAsync(place, lent[i].data,
                            static_cast<std::size_t>(lent[i].shared_bytes),
                            cudaMemcpyDeviceToDevice, stream);
  }
  if (error == cudaSuccess) error = cudaEventRecord(Current().ready, stream);
  note = Current().note;
  return error;
}

cudaError_t DeviceWindow::AwaitReady(std::int32_t rank, const WindowNote& note,
                                     cudaStream_t stream, const char*& half) {
  Opened& opened = opened_[rank][num_exchanges_ % halves_.size()];
  cudaError_t error = Open(note, opened);
  if (error != cudaSuccess) return error;
  half = static_cast<const char*>(opened.memory);
  return cudaStreamWaitEvent(stream, opened.ready, 0);
}

cudaError_t DeviceWindow::MakeEvent(Half& half) {
  if (half.ready != nullptr) return cudaSuccess;
  constexpr unsigned kFlags = cudaEventDisableTiming | cudaEventInterprocess;
  const cudaError_t error = cudaEventCreateWithFlags(&half.ready, kFlags);
  if (error != cudaSuccess) return error;
  return cudaIpcGetEventHandle(&half.note.ready, half.ready);
}

// Others may read what it had until now, and have it open: it stays for good. As each
// memory has twice the size of the one before, all of them together have twice the size
// of the last.
cudaError_t DeviceWindow::Reserve(Half& half, std::size_t bytes) {
  if (bytes <= half.bytes) return cudaSuccess;
  bytes = std::max(bytes, 2 * half.bytes);
  void* memory = nullptr;
  cudaError_t error = cudaMalloc(&memory, bytes);
  if (error != cudaSuccess) return error;
  half.memory = memory;
  half.bytes = bytes;
  half.note.memory_number = ++half.number;
  return cudaIpcGetMemHandle(&half.note.memory, memory);
}

cudaError_t DeviceWindow::Open(const WindowNote& note, Opened& opened) {
  cudaError_t error = cudaSuccess;
  if (opened.ready == nullptr) {
    error = cudaIpcOpenEventHandle(&opened.ready, note.ready);
  }
  if (error != cudaSuccess || opened.number == note.memory_number) return error;
  void* memory = nullptr;
  error = cudaIpcOpenMemHandle(&memory, note.memory, cudaIpcMemLazyEnablePeerAccess);
  if (error != cudaSuccess) return error;
  opened.memory = memory;
  opened.number = note.memory_number;
  return cudaSuccess;
}

}  // namespace jax_ep
