// What the library for GPUs says where it does not run.
#include <cuda_runtime.h>

#include <cstddef>
#include <string>
#include <vector>

#include "check.h"

extern "C" int jax_ep_cuda_problem(const int* devices, int num_devices, char* text,
                                   int bytes);

namespace jax_ep {
namespace {

std::string Problem(const std::vector<int>& devices, int bytes = 512) {
  std::string text(static_cast<std::size_t>(bytes), 'U');
  const int found = jax_ep_cuda_problem(
      devices.data(), static_cast<int>(devices.size()), text.data(), bytes);
  text.resize(text.find('\0'));
  EP_CHECK_EQ(found, text.empty() ? 0 : 1);
  return text;
}

// Puts the emulated driver back to what it was.
struct Restore {
  ~Restore() {
    emulation::driver_version = CUDART_VERSION;
    emulation::load_result = cudaSuccess;
  }
};

EP_TEST(SaysNothingWhereKernelsRun) {
  EP_CHECK_EQ(Problem({}), "");
  EP_CHECK_EQ(Problem({0, 3}), "");
}

EP_TEST(NamesTheDriverThatIsTooOld) {
  const Restore restore;
  emulation::driver_version = 0;
  EP_CHECK_EQ(Problem({0}), "there is no CUDA driver");
  emulation::driver_version = 12090;
  EP_CHECK_EQ(
      Problem({0}),
      "the native library needs a driver of CUDA 13.0 or later, and this one is "
      "of 12.9");
  emulation::driver_version = 13000;
  EP_CHECK_EQ(Problem({0}), "");
  emulation::driver_version = 14020;
  EP_CHECK_EQ(Problem({0}), "");
}

EP_TEST(NamesTheDeviceWithoutCode) {
  const Restore restore;
  emulation::load_result = cudaErrorLaunchFailure;
  EP_CHECK_EQ(Problem({2}), std::string("the native library does not run on GPU 2, of "
                                        "compute capability 1.1: CUDA says ") +
                                cudaGetErrorString(cudaErrorLaunchFailure));
  EP_CHECK_EQ(Problem({}), "");
}

EP_TEST(NamesTheDeviceThatIsNotThere) {
  const std::string problem = Problem({1, emulation::kMaxDevices});
  EP_CHECK(problem.find("GPU " + std::to_string(emulation::kMaxDevices)) !=
           std::string::npos);
}

EP_TEST(KeepsToTheRoomForItsWords) {
  const Restore restore;
  emulation::driver_version = 0;
  EP_CHECK_EQ(Problem({0}, 10), "there is ");
  EP_CHECK_EQ(jax_ep_cuda_problem(nullptr, 0, nullptr, 0), 1);
}

EP_TEST(LeavesTheCurrentDevice) {
  EP_CHECK_EQ(cudaSetDevice(1), cudaSuccess);
  EP_CHECK_EQ(Problem({0, 2}), "");
  int device = -1;
  EP_CHECK_EQ(cudaGetDevice(&device), cudaSuccess);
  EP_CHECK_EQ(device, 1);
}

}  // namespace
}  // namespace jax_ep
