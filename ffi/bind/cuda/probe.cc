// Whether this machine's driver and GPUs run the kernels: asked once, before any
// program is made that needs them, as it would fail where it runs.
#include "cuda/probe.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <span>
#include <string>
#include <thread>

#include "bind/process/tell.h"
#include "fabric/gpus/cuda_says.h"

namespace jax_ep {
namespace {

// Drivers run what was built with a later minor version than theirs. Older ones than
// 12.3 do not load kernels while a CUDA graph is recorded.
constexpr int kNeededDriver = std::max(CUDART_VERSION / 1000 * 1000, 12030);

std::string Version(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string DriverProblem() {
  int driver = 0;
  if (const cudaError_t error = cudaDriverGetVersion(&driver); error != cudaSuccess) {
    return CudaSays(error);
  }
  if (driver == 0) return "there is no CUDA driver";
  if (driver < kNeededDriver) {
    return "the native library needs a driver of CUDA " + Version(kNeededDriver) +
           " or later, and this one is of " + Version(driver);
  }
  return "";
}

std::string DeviceProblem(int device) {
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cuda::Probe();
  if (error == cudaSuccess) return "";
  int major = 0;
  int minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return "the native library does not run on GPU " + std::to_string(device) +
         ", of compute capability " + Version(major * 1000 + minor * 10) + ": " +
         CudaSays(error);
}

std::string Problem(std::span<const int> devices) {
  std::string problem = DriverProblem();
  for (const int device : devices) {
    if (!problem.empty()) break;
    problem = DeviceProblem(device);
  }
  return problem;
}

}  // namespace
}  // namespace jax_ep

// Writes why the kernels do not run on one of these devices, by CUDA's numbers; returns
// whether there is anything to write.
extern "C" int jax_ep_cuda_problem(const int* devices, int num_devices, char* text,
                                   int bytes) {
  std::string problem;
  // Which device is current belongs to a thread: the caller's stays as it is.
  std::thread([&] {
    problem = jax_ep::Problem({devices, static_cast<std::size_t>(num_devices)});
  }).join();
  jax_ep::Tell(problem, text, bytes);
  return problem.empty() ? 0 : 1;
}
