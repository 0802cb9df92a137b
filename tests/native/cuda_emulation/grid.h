// Runs the threads of a kernel's grid on the CPU, in a random order.

#ifndef JAX_EP_TESTS_NATIVE_CUDA_EMULATION_GRID_H_
#define JAX_EP_TESTS_NATIVE_CUDA_EMULATION_GRID_H_

#include <array>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>

#include "vector_types.h"

// Which thread runs, by the names that kernels know. Grids of several devices run at
// once, each on a thread of the host.
extern thread_local uint3 threadIdx;
extern thread_local uint3 blockIdx;
extern thread_local dim3 blockDim;
extern thread_local dim3 gridDim;

namespace jax_ep::emulation {

inline constexpr unsigned kLanes = 32;

// One value of each lane of a warp.
using LaneValues = std::array<std::uint64_t, kLanes>;

// Something that several threads of a block do together.
struct Collective {
  const char* name;
  unsigned lanes;  // of the warp, that take part; 0: all threads of the block
  std::source_location where;
};

// Runs a kernel's threads: blocks one after the other, and of a block one thread at a
// time, up to where it waits for others. Returns whether all came to their end; if not,
// Failure() of the same thread says why. One grid at a time on each thread of the host.
//
// Stricter than a GPU: threads that meet must do so at one place in the source, and
// those that have left the kernel are missed.
bool RunGrid(dim3 grid, dim3 block, const std::function<void()>& thread);

const std::string& Failure();

// Decides in which order blocks, and threads that could run, do run, of grids that this
// thread of the host runs.
void SetSeed(std::uint64_t seed);

// What a thread calls: waits until all that take part have come; gives what they
// brought.
LaneValues Meet(const Collective& collective, std::uint64_t brought = 0);

// What a lane of a warp calls that brought a value: returns the one of another lane.
std::uint64_t ValueOf(const LaneValues& values, const Collective& collective,
                      unsigned lane);

// The lane that runs.
unsigned OwnLane();

}  // namespace jax_ep::emulation

#endif  // JAX_EP_TESTS_NATIVE_CUDA_EMULATION_GRID_H_
