# Sets JAX_EP_WITH_CUDA, and enables the language where it is ON.
set(JAX_EP_WITH_CUDA OFF)
if(JAX_EP_CUDA STREQUAL "OFF")
  return()
endif()

function(leave_out_cuda reason)
  if(JAX_EP_CUDA STREQUAL "AUTO")
    message(STATUS "The library for GPUs is left out: ${reason}")
  else()
    message(FATAL_ERROR "JAX_EP_CUDA=${JAX_EP_CUDA}, but ${reason}")
  endif()
endfunction()

# Four architectures take their time: an editable install compiles them where it is told to.
if(JAX_EP_CUDA STREQUAL "AUTO" AND SKBUILD_STATE STREQUAL "editable")
  leave_out_cuda("this install is editable; `make cuda` or JAX_EP_CUDA=ON builds it")
  return()
endif()

if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  # The nvidia-cuda-nvcc wheels have theirs among Python's packages.
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import nvidia; print(*nvidia.__path__, sep=';')"
    OUTPUT_VARIABLE nvidia_packages OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  list(TRANSFORM nvidia_packages APPEND /cu13/bin)
  find_program(CMAKE_CUDA_COMPILER nvcc PATHS /usr/local/cuda/bin ${nvidia_packages})
endif()
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  leave_out_cuda("there is no CUDA compiler: put nvcc on the PATH, set CUDACXX, or install \
the Python packages of jax_ep[cuda-build]")
  return()
endif()

# The wheels' nvcc looks for its libraries in lib64, and has them in lib.
if(CMAKE_CUDA_COMPILER)
  get_filename_component(toolkit ${CMAKE_CUDA_COMPILER} DIRECTORY)
  if(EXISTS ${toolkit}/../lib/libcudart_static.a)
    set(ENV{CUDAFLAGS} "$ENV{CUDAFLAGS} -L${toolkit}/../lib")
  endif()
endif()

# Stops CMake from choosing one; the kernels have their own in cuda/CMakeLists.txt.
set(CMAKE_CUDA_ARCHITECTURES 80)
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.9)
  leave_out_cuda("${CMAKE_CUDA_COMPILER} is of CUDA ${CMAKE_CUDA_COMPILER_VERSION}, below 12.9")
  return()
endif()
set(JAX_EP_WITH_CUDA ON)
