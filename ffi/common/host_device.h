#ifndef JAX_EP_FFI_COMMON_HOST_DEVICE_H_
#define JAX_EP_FFI_COMMON_HOST_DEVICE_H_

// Before a function that kernels on a GPU call too.
#if defined(__CUDACC__)
#define EP_HOST_DEVICE __host__ __device__
#else
#define EP_HOST_DEVICE
#endif

#endif  // JAX_EP_FFI_COMMON_HOST_DEVICE_H_
