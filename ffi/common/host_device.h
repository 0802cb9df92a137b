// EP_HOST_DEVICE stands before what CPUs and kernels on a GPU both call.

#ifndef JAX_EP_FFI_COMMON_HOST_DEVICE_H_
#define JAX_EP_FFI_COMMON_HOST_DEVICE_H_

#if defined(__CUDACC__)
#define EP_HOST_DEVICE __host__ __device__
#else
#define EP_HOST_DEVICE
#endif

#endif  // JAX_EP_FFI_COMMON_HOST_DEVICE_H_
