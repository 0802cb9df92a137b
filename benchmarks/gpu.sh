#!/usr/bin/env bash
# Builds, tests, sanitizes and times the library on a machine with one GPU and no network, from a
# copy of the tree, within 10 minutes. A stage that fails is reported and the others run.
#
# It takes the machine's Python (PYTHON, python3 by default) with these packages:
#   jax[cuda13]>=0.11.2 jaxtyping absl-py pytest hypothesis flax cmake ninja
# and, where it has them, filelock (to share compiled programs between stages), pytest-xdist, and
# optax, matplotlib and tqdm (for the example's tests). Those it lacks may lie as wheels in the
# folder WHEELS. It also takes nvcc and compute-sanitizer of CUDA 13, on the PATH or in
# /usr/local/cuda. Results go to the folder OUT, benchmarks/results by default; COMMIT names the
# commit where the copy is no checkout. BUDGET is how many seconds there are in all; PATIENCE
# multiplies the limits of stages, for slower machines; QUICK=1 times next to nothing.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export PATH=$PATH:/usr/local/cuda/bin
python=$(command -v "${PYTHON:-python3}") || {
  echo "There is no Python." >&2
  exit 2
}
out=${OUT:-benchmarks/results}
build=$(mktemp -d)
# CMake and Ninja may be Python packages, installed beside Python or from wheels.
PATH=$PATH:$(dirname "$python"):$build/site/bin
trap 'rm -rf "$build"' EXIT
mkdir -p "$out"

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# The tests compare with the CPU; several programs share the GPU.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu} XLA_PYTHON_CLIENT_PREALLOCATE=false
export JAX_EP_REQUIRE_GPU=1
# JAX locks its cache only where that has a size to keep to.
if "$python" -c 'import filelock' 2>/dev/null; then
  export JAX_COMPILATION_CACHE_DIR=$build/cache JAX_COMPILATION_CACHE_MAX_SIZE=$((8 << 30))
  export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
fi

query() { nvidia-smi --query-gpu="$1" --format=csv,noheader --id=0; }
gpu=$(query name) || {
  echo "There is no NVIDIA GPU." >&2
  exit 2
}
capability=$(query compute_cap | tr -d .)
case $capability in
  8?) architecture=80 ;;
  90) architecture=90 ;;
  10?) architecture=100f ;;
  12?) architecture=120f ;;
  *)
    echo "No kernels are built for compute capability $capability." >&2
    exit 2
    ;;
esac
slug=$(tr -cs '[:alnum:]' - <<<"${gpu,,}" | sed 's/-*$//')
results=$out/gpu-$slug.jsonl
printf '{"bench": "gpu run", "commit": "%s", "gpu": "%s", "driver": "%s", "nvcc": "%s"}\n' \
  "${COMMIT:-$(git describe --always --dirty 2>/dev/null)}" "$gpu" "$(query driver_version)" \
  "$(nvcc --version | grep -o 'V[0-9.]*$')" >"$results"

# stage NAME LIMIT COMMAND...: runs at most LIMIT seconds, or what is left; records how that went.
stage() {
  local name=$1 limit=$(($2 * ${PATIENCE:-1})) left=$((${BUDGET:-570} - SECONDS)) begin=$SECONDS status=0
  shift 2
  ((limit < left)) || limit=$((left > 0 ? left : 1))
  printf '\n=== %s, at most %d s: %s\n' "$name" "$limit" "$*"
  timeout --kill-after=5 "$limit" "$@" || status=$?
  printf '=== %s: status %d after %d s\n' "$name" "$status" $((SECONDS - begin))
  printf '{"bench": "gpu stages", "stage": "%s", "status": %d, "seconds": %d}\n' \
    "$name" "$status" $((SECONDS - begin)) >>"$results"
  return "$status"
}

install_wheels() {
  "$python" -m pip install --quiet --no-index --no-deps --target "$build/site" "$WHEELS"/*.whl
}

build_libraries() {
  cmake -S ffi -B "$build/ffi" -G Ninja --log-level=WARNING -DPython_EXECUTABLE="$python" \
    -DJAX_EP_CUDA=ON -DJAX_EP_CUDA_ARCHITECTURES="$architecture" &&
    cmake --build "$build/ffi" &&
    cmake --install "$build/ffi" --component python --prefix . &&
    "$python" ffi/cuda/resources.py table "$build/ffi"
}

pytest_here() { "$python" -m pytest -q --tb=short --maxfail=20 -p no:cacheprovider "$@"; }

gpu_tests() {
  local parallel=()
  ! "$python" -c 'import xdist' 2>/dev/null || parallel=(-n 8)
  # Calls of foreign code are recorded into CUDA graphs where XLA is told so; its dumps, of
  # programs that are compiled and not loaded, show whether they were.
  local flags="--xla_gpu_enable_command_buffer=+FUSION,+CUSTOM_CALL --xla_gpu_graph_min_graph_size=1"
  flags+=" --xla_dump_to=$build/graphs --xla_dump_hlo_module_re=replayed"
  XLA_FLAGS=$flags JAX_COMPILATION_CACHE_DIR='' pytest_here tests/test_gpu.py
  local graphs=$?
  pytest_here tests -k gpu "${parallel[@]}" && return "$graphs"
}

# Every buffer is an allocation of its own, so that what runs over one end is seen; kernels are
# launched one by one rather than as a graph. The kernels and calls of others are none of our
# business.
sanitize() {
  XLA_PYTHON_CLIENT_ALLOCATOR=platform XLA_FLAGS=--xla_gpu_enable_command_buffer= \
    compute-sanitizer --tool "$1" --port "$2" --target-processes application-only \
    --launch-timeout 120 --report-api-errors no --kernel-name kernel_substring=jax_ep \
    --error-exitcode 9 --print-limit 20 \
    "$python" -m pytest -q --tb=short -p no:cacheprovider tests/test_gpu.py -k awkward
}

# Alone on the GPU, it may take all of its memory beforehand.
time_exchange() {
  XLA_PYTHON_CLIENT_PREALLOCATE=true "$python" benchmarks/bench_gpu.py ${QUICK:+--quick} |
    tee "$build/bench.log"
}

export -f install_wheels build_libraries pytest_here gpu_tests sanitize time_exchange
export python build architecture WHEELS=${WHEELS:-} QUICK=${QUICK:-}
run() { stage "$1" "$2" bash -c 'set -o pipefail; "$@"' bash "${@:3}"; }

failed=() jobs=()
if [[ -n $WHEELS ]]; then
  run wheels 30 install_wheels || failed+=(wheels)
  PYTHONPATH=$build/site:$PYTHONPATH
fi
run build 100 build_libraries || failed+=(build)

# The timings come first and alone. What follows them compiles far more than it runs on the GPU.
run timings 230 time_exchange || failed+=(timings)
grep '^{' "$build/bench.log" >>"$results"

port=49152
for tool in memcheck racecheck synccheck; do
  ((port += 100))
  run "$tool" 240 sanitize "$tool" "$port" >"$build/$tool.log" 2>&1 &
  jobs+=("$!:$tool")
done
run tests 240 gpu_tests || failed+=(tests)
for job in "${jobs[@]}"; do
  wait "${job%%:*}" || failed+=("${job##*:}")
  tail -n 40 "$build/${job##*:}.log"
done

printf '\n=== %d s in all; results are in %s\n' "$SECONDS" "$results"
[[ ${#failed[@]} == 0 ]] || echo "=== failed: ${failed[*]}"
[[ ${#failed[@]} == 0 ]]
