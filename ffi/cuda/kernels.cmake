# The kernels and what launches them, for a GPU or an emulated one.
set(cuda_kernels
  encode_rows.cu
  gather_rows.cu
  gather_scaled.cu
  partial_sums.cu
  plan.cu
  plan_count_asked.cu
  plan_count_kept.cu
  plan_find_cutoffs.cu
  plan_lay_out.cu
  plan_one_block.cu
  plan_place.cu
  probe.cu
  reduce_rows.cu
  row_dots.cu
  stamp.cu)
list(TRANSFORM cuda_kernels PREPEND ${CMAKE_CURRENT_LIST_DIR}/)

# What brings ranks on several GPUs together, as C++.
set(cuda_fabrics
  device_window.cc
  gpu_clock.cc
  shared_memory.cc
  signal.cc
  stream_exchange.cc
  stream_points.cc
  stream_times.cc)
list(TRANSFORM cuda_fabrics PREPEND ${CMAKE_CURRENT_LIST_DIR}/../fabric/gpus/)
