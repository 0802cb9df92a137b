// Stands in for what kernels ask of the compiler and the device besides threads.

#ifndef JAX_EP_TESTS_NATIVE_CUDA_EMULATION_INTRINSICS_H_
#define JAX_EP_TESTS_NATIVE_CUDA_EMULATION_INTRINSICS_H_

// Every emulated thread has parameters of its own.
#define __grid_constant__

#endif  // JAX_EP_TESTS_NATIVE_CUDA_EMULATION_INTRINSICS_H_
