# Sets JAX_EP_WITH_CUDA, and enables the language where it is ON.
set(JAX_EP_WITH_CUDA OFF)
if(NOT JAX_EP_CUDA)
  return()
endif()

function(leave_out_cuda reason)
  if(JAX_EP_CUDA STREQUAL "AUTO")
    message(STATUS "The library for GPUs is left out: ${reason}")
  else()
    message(FATAL_ERROR "JAX_EP_CUDA=${JAX_EP_CUDA}, but ${reason}")
  endif()
endfunction()

if(DEFINED ENV{CUDACXX})
  get_filename_component(nvcc "$ENV{CUDACXX}" PROGRAM)
else()
  execute_process(
    COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/find_nvcc.py
    OUTPUT_VARIABLE nvcc_of_packages OUTPUT_STRIP_TRAILING_WHITESPACE)
  find_program(CMAKE_CUDA_COMPILER nvcc PATHS /usr/local/cuda/bin ${nvcc_of_packages})
  set(nvcc ${CMAKE_CUDA_COMPILER})
endif()
if(NOT nvcc)
  leave_out_cuda("there is no CUDA compiler. Put nvcc on the PATH, set CUDACXX to it, or: \
pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-cuda-runtime nvidia-nvvm")
  return()
endif()

# The wheels' nvcc looks for its libraries in lib64, and has them in lib.
get_filename_component(toolkit ${nvcc} DIRECTORY)
if(EXISTS ${toolkit}/../lib/libcudart_static.a)
  set(ENV{CUDAFLAGS} "$ENV{CUDAFLAGS} -L${toolkit}/../lib")
endif()

# Stops CMake from choosing one; the kernels have their own in cuda/CMakeLists.txt.
set(CMAKE_CUDA_ARCHITECTURES 80)
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.9)
  leave_out_cuda("${CMAKE_CUDA_COMPILER} is of CUDA ${CMAKE_CUDA_COMPILER_VERSION}, below 12.9")
  return()
endif()
set(JAX_EP_WITH_CUDA ON)
