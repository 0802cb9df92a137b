// The emulated devices' own tests: fabrics' tests say nothing if their streams let
// mistakes pass.
#include <cuda_runtime.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "check.h"
#include "emulated_streams.h"

namespace jax_ep {
namespace {

using std::chrono::microseconds;

cudaEvent_t NewEvent() {
  cudaEvent_t event = nullptr;
  EP_CHECK_EQ(
      cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventInterprocess),
      cudaSuccess);
  return event;
}

cudaError_t Append(cudaStream_t stream, std::vector<int>& to, int number) {
  return emulation::Enqueue(stream, [&to, number] {
    to.push_back(number);
    return cudaSuccess;
  });
}

EP_TEST(AStreamKeepsItsOrder) {
  const Latency latency(microseconds(200));
  const OwnStream stream;
  std::vector<int> numbers;
  for (int i = 0; i < 20; ++i) Append(stream.get(), numbers, i);
  EP_CHECK_EQ(cudaStreamSynchronize(stream.get()), cudaSuccess);
  for (int i = 0; i < 20; ++i) EP_CHECK_EQ(numbers[static_cast<std::size_t>(i)], i);
}

EP_TEST(AStreamWaitsForWhatWasRecorded) {
  const Latency latency(microseconds(300));
  const OwnStream one;
  const OwnStream other;
  std::vector<int> numbers;
  for (int turn = 0; turn < 30; ++turn) {
    const cudaEvent_t event = NewEvent();
    Append(one.get(), numbers, 2 * turn);
    EP_CHECK_EQ(cudaEventRecord(event, one.get()), cudaSuccess);
    EP_CHECK_EQ(cudaStreamWaitEvent(other.get(), event), cudaSuccess);
    // It is gone for the host, not for the streams.
    EP_CHECK_EQ(cudaEventDestroy(event), cudaSuccess);
    Append(other.get(), numbers, 2 * turn + 1);
    EP_CHECK_EQ(cudaStreamSynchronize(other.get()), cudaSuccess);
  }
  for (int i = 0; i < 60; ++i) EP_CHECK_EQ(numbers[static_cast<std::size_t>(i)], i);
}

EP_TEST(WhatIsRecordedLaterIsNotWaitedFor) {
  const OwnStream one;
  const OwnStream other;
  const cudaEvent_t event = NewEvent();
  EP_CHECK_EQ(cudaStreamWaitEvent(other.get(), event), cudaSuccess);
  EP_CHECK_EQ(cudaStreamSynchronize(other.get()), cudaSuccess);
  EP_CHECK_EQ(cudaEventRecord(event, one.get()), cudaSuccess);
  EP_CHECK_EQ(cudaStreamWaitEvent(other.get(), event), cudaSuccess);
  std::atomic<bool> may_go_on = false;
  emulation::Enqueue(one.get(), [&] {
    while (!may_go_on) {
    }
    return cudaSuccess;
  });
  EP_CHECK_EQ(cudaEventRecord(event, one.get()), cudaSuccess);
  EP_CHECK_EQ(cudaStreamSynchronize(other.get()), cudaSuccess);
  may_go_on = true;
  EP_CHECK_EQ(cudaStreamSynchronize(one.get()), cudaSuccess);
  EP_CHECK_EQ(cudaEventDestroy(event), cudaSuccess);
}

__global__ void Store(int* to, int number) { *to = number; }

__global__ void NeverMeet() {
  if (threadIdx.x == 0) __syncthreads();
}

cudaError_t LaunchOn(cudaStream_t stream, int* to, int number) {
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(1);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, Store, to, number);
}

EP_TEST(AKernelsArgumentsAreCopiedWhenItIsLaunched) {
  const Latency latency(microseconds(500));
  const OwnStream stream;
  int stored = 0;
  int number = 7;
  EP_CHECK_EQ(LaunchOn(stream.get(), &stored, number), cudaSuccess);
  number = 8;
  EP_CHECK_EQ(cudaStreamSynchronize(stream.get()), cudaSuccess);
  EP_CHECK_EQ(stored, 7);
}

EP_TEST(AKernelThatFailsIsTheStreamsError) {
  const OwnStream stream;
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(2);
  config.stream = stream.get();
  EP_CHECK_EQ(cudaLaunchKernelEx(&config, NeverMeet), cudaSuccess);
  EP_CHECK_EQ(cudaStreamSynchronize(stream.get()), cudaErrorLaunchFailure);
}

EP_TEST(NothingIsWaitedForInACapture) {
  const OwnStream stream;
  const cudaEvent_t event = NewEvent();
  void* memory = nullptr;
  emulation::SetCapturing(true);
  EP_CHECK_EQ(cudaStreamSynchronize(stream.get()), cudaErrorStreamCaptureUnsupported);
  EP_CHECK_EQ(cudaStreamWaitEvent(stream.get(), event),
              cudaErrorStreamCaptureUnsupported);
  EP_CHECK_EQ(cudaEventRecord(event, stream.get()), cudaErrorStreamCaptureUnsupported);
  EP_CHECK_EQ(cudaMalloc(&memory, 8), cudaErrorStreamCaptureUnsupported);
  emulation::SetCapturing(false);
  EP_CHECK_EQ(cudaEventDestroy(event), cudaSuccess);
}

// What one process tells another by a pipe.
struct Handles {
  cudaIpcMemHandle_t memory;
  cudaIpcEventHandle_t ready;
};

// The other process: waits on its stream for the event, reads the memory's number.
int ReadNumber(const Handles& handles) {
  void* memory = nullptr;
  cudaEvent_t ready = nullptr;
  const OwnStream stream;
  if (cudaIpcOpenMemHandle(&memory, handles.memory, cudaIpcMemLazyEnablePeerAccess) !=
          cudaSuccess ||
      cudaIpcOpenEventHandle(&ready, handles.ready) != cudaSuccess ||
      cudaStreamWaitEvent(stream.get(), ready) != cudaSuccess) {
    return -1;
  }
  int number = -1;
  cudaMemcpyAsync(&number, memory, sizeof(number), cudaMemcpyDeviceToHost,
                  stream.get());
  if (cudaStreamSynchronize(stream.get()) != cudaSuccess) return -1;
  return number;
}

EP_TEST(AnotherProcessSeesMemoryAndEvents) {
  std::array<int, 2> pipe_ends = {};
  EP_CHECK_EQ(pipe(pipe_ends.data()), 0);
  const pid_t child = fork();
  if (child == 0) {
    Handles handles = {};
    const auto got = read(pipe_ends[0], &handles, sizeof(handles));
    _exit(got == sizeof(handles) ? ReadNumber(handles) : 1);
  }
  void* memory = nullptr;
  Handles handles = {};
  EP_CHECK_EQ(cudaMalloc(&memory, sizeof(int)), cudaSuccess);
  const cudaEvent_t ready = NewEvent();
  EP_CHECK_EQ(cudaIpcGetMemHandle(&handles.memory, memory), cudaSuccess);
  EP_CHECK_EQ(cudaIpcGetEventHandle(&handles.ready, ready), cudaSuccess);
  void* opened = nullptr;
  EP_CHECK_EQ(cudaIpcOpenMemHandle(&opened, handles.memory, 0),
              cudaErrorInvalidResourceHandle);
  const Latency latency(microseconds(20000));
  const OwnStream stream;
  EP_CHECK_EQ(LaunchOn(stream.get(), static_cast<int*>(memory), 42), cudaSuccess);
  EP_CHECK_EQ(cudaEventRecord(ready, stream.get()), cudaSuccess);
  EP_CHECK_EQ(write(pipe_ends[1], &handles, sizeof(handles)),
              static_cast<ssize_t>(sizeof(handles)));
  int status = 0;
  EP_CHECK_EQ(waitpid(child, &status, 0), child);
  EP_CHECK_EQ(WEXITSTATUS(status), 42);
  EP_CHECK_EQ(cudaFree(memory), cudaSuccess);
  EP_CHECK_EQ(cudaEventDestroy(ready), cudaSuccess);
}

}  // namespace
}  // namespace jax_ep
