// Stands in for CUDA's vectors of a few numbers.

#ifndef JAX_EP_TESTS_NATIVE_CUDA_EMULATION_VECTOR_TYPES_H_
#define JAX_EP_TESTS_NATIVE_CUDA_EMULATION_VECTOR_TYPES_H_

struct uint3 {
  unsigned x, y, z;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct dim3 {
  constexpr dim3(unsigned of_x = 1, unsigned of_y = 1, unsigned of_z = 1)
      : x(of_x), y(of_y), z(of_z) {}
  unsigned x, y, z;
};

#endif  // JAX_EP_TESTS_NATIVE_CUDA_EMULATION_VECTOR_TYPES_H_
