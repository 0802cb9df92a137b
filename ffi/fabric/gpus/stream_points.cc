// Implements stream_points.h.

#include "fabric/gpus/stream_points.h"

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "fabric/gpus/signal.h"

namespace jax_ep {
namespace {

// Pairs that no exchange uses, by device. Events are made once and never destroyed:
// streams of exchanges that failed may still wait for some.
struct Pool {
  std::mutex mutex;
  std::map<int, std::vector<StreamPoints*>> unused;  // guarded by it
};

Pool& ThePool() {
  static auto* pool = new Pool();
  return *pool;
}

StreamPoints* TakeUnused(int device) {
  const std::scoped_lock lock(ThePool().mutex);
  std::vector<StreamPoints*>& unused = ThePool().unused[device];
  if (unused.empty()) return nullptr;
  StreamPoints* points = unused.back();
  unused.pop_back();
  return points;
}

StreamPoints* NewStreamPoints(int device, cudaError_t& error) {
  auto points = std::make_unique<StreamPoints>();
  points->device = device;
  for (cudaEvent_t* event : {&points->ready, &points->done}) {
    error = cudaEventCreateWithFlags(event, cudaEventDisableTiming);
    if (error != cudaSuccess) return nullptr;
  }
  return points.release();
}

}  // namespace

StreamPoints* TakeStreamPoints(std::int32_t num_users, cudaError_t& error) {
  int device = 0;
  error = cudaGetDevice(&device);
  if (error != cudaSuccess) return nullptr;
  StreamPoints* points = TakeUnused(device);
  if (points == nullptr) points = NewStreamPoints(device, error);
  if (points == nullptr) return nullptr;
  points->recorded.Clear();
  points->num_users.store(num_users, std::memory_order_relaxed);
  return points;
}

void ReleaseStreamPoints(StreamPoints* points) {
  // Acquires what the others did with them, for whoever takes them next.
  if (points->num_users.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  const std::scoped_lock lock(ThePool().mutex);
  ThePool().unused[points->device].push_back(points);
}

std::vector<int> DevicesWithPoints() {
  const std::scoped_lock lock(ThePool().mutex);
  std::vector<int> devices;
  for (const auto& [device, points] : ThePool().unused) devices.push_back(device);
  return devices;
}

}  // namespace jax_ep
