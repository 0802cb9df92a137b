# `make help` lists what there is. Nothing needs an active environment: all goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
PIP_ARGS ?=

BIN := $(VENV)/bin
RUN := $(BIN)/python
PACKAGE := $(VENV)/.package
TOOLS := $(VENV)/.tools
WHEEL_TOOLS := build/wheel-tools/.wheel
NATIVE_SOURCES := $(shell find ffi -type f -not -path '*/cuda/*')
LIBRARY := jax_ep/libjax_ep_cpu.so
CUDA_LIBRARY := jax_ep/libjax_ep_cuda.so
CUDA_ARCHITECTURES ?= 80;90;100f;120f
CONFIGURE = $(BIN)/cmake -S ffi -G Ninja --log-level=WARNING \
  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPython_EXECUTABLE=$(abspath $(RUN))
CXX_FILES = find ffi tests/native -name '*.cc' -o -name '*.cu' -o -name '*.h'
# Installs what one of the package's extras names into an environment.
install_extra = $(1)/bin/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb')) \
  ['project']['optional-dependencies']['$(2)'], sep='\n')" > $(1)/$(2).txt \
  && $(1)/bin/python -m pip install --quiet --requirement $(1)/$(2).txt
clang_tidy = $(RUN) $(BIN)/run-clang-tidy.py -quiet -p $(1) -clang-tidy-binary $(BIN)/clang-tidy '\.$(2)$$' \
  > $(1)/clang-tidy.log 2>&1 || { cat $(1)/clang-tidy.log; exit 1; }

.DELETE_ON_ERROR:
.PHONY: help demo serve test lint lint-lengths lint-python lint-native-format lint-native format native-test emulated-test arm-test trainers-test protocol cuda docs wheel bench clean
.DEFAULT_GOAL := help

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

demo: $(PACKAGE) ## train a small MoE language model on 8 CPU devices
	$(RUN) examples/train_moe_lm.py

serve: $(PACKAGE) ## serve a small MoE language model on 8 CPU devices, with its experts spread and without
	$(RUN) examples/serve_moe.py

test: $(PACKAGE) ## run the tests
	$(RUN) -m pytest $(PYTEST_ARGS)

lint: lint-lengths lint-python lint-native-format lint-native ## check style, types, layers and native code

# The parts of lint, which .pre-commit-config.yaml names too.
lint-lengths: $(RUN)
	$(RUN) .ci/check_lengths.py

lint-python: $(PACKAGE) $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(RUN)
	$(BIN)/lint-imports --no-cache

lint-native-format: $(TOOLS)
	$(RUN) ffi/check_includes.py
	$(CXX_FILES) | xargs $(BIN)/clang-format --dry-run -Werror

# clang reads the kernels for GPUs as the C++ that they are on the emulated device.
lint-native: build/lint/compile_commands.json build/lint-kernels/compile_commands.json
	$(call clang_tidy,build/lint,cc)
	$(call clang_tidy,build/lint-kernels,cu)

format: $(TOOLS) ## rewrite sources in the project's style
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .
	$(CXX_FILES) | xargs $(BIN)/clang-format -i

native-test: build/native-plain build/native-address build/native-thread ## run the C++ tests, plain and under sanitizers

# The handlers and kernels for GPUs, as foreign calls of XLA:CPU.
EMULATED_TESTS ?= tests

emulated-test: FORCE $(PACKAGE) $(TOOLS) ## run the tests on emulated GPUs (half an hour; EMULATED_TESTS= chooses)
	$(CONFIGURE) -B build/native-plain -DJAX_EP_CUDA=OFF -DJAX_EP_NATIVE_TESTS=ON -DJAX_EP_WERROR=ON -DJAX_EP_SANITIZE=
	$(BIN)/cmake --build build/native-plain --target jax_ep_cuda_emulated
	JAX_EP_EMULATED_GPUS=$(abspath build/native-plain/native_tests/libjax_ep_cuda_emulated.so) JAX_EP_REQUIRE_NATIVE=1 \
	  $(RUN) -m pytest $(EMULATED_TESTS) -m 'not xla' $(PYTEST_ARGS)

# Linked with musl, which a program can hold all of: nothing else for arm64 has to be here. Two tests
# know the system's errors by the words of another C library; one wants a processor without delays.
QEMU ?= qemu-aarch64-static

arm-test: FORCE $(PACKAGE) $(TOOLS) $(WHEEL_TOOLS) ## run the C++ tests on an emulated arm64 processor (needs qemu-user-static)
	$(CONFIGURE) -B build/native-arm -DJAX_EP_CUDA=OFF -DJAX_EP_NATIVE_TESTS=ON -DJAX_EP_EMULATE_CUDA=OFF \
	  -DJAX_EP_WERROR=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  '-DCMAKE_CXX_COMPILER=$(abspath $(dir $(WHEEL_TOOLS)))/bin/python;-m;ziglang;c++;-target;aarch64-linux-musl' \
	  -DCMAKE_LINK_DEPENDS_USE_LINKER=OFF -DCMAKE_EXE_LINKER_FLAGS=-static \
	  -DCMAKE_CROSSCOMPILING_EMULATOR=$(QEMU)
	$(BIN)/cmake --build build/native-arm --target native_tests/all
	$(BIN)/ctest --test-dir build/native-arm --output-on-failure --no-tests=error --timeout 300 \
	  --exclude-regex '^(cores|host_connecting|shared_file)_test$$'

# MaxText and Levanter ask for Python 3.12.
TRAINERS_PYTHON ?= python3.12
TRAINERS := build/trainers-venv

trainers-test: $(PACKAGE) $(TRAINERS)/.installed ## run the tests with MaxText, Tunix and Levanter (needs Python 3.12 or later; takes 1 GB)
	PYTHONPATH=$(CURDIR) $(TRAINERS)/bin/python -m pytest tests/with_trainers $(PYTEST_ARGS)

protocol: ## have spin check the model of the protocol between processes (needs spin and gcc)
	docs/protocol/check build/protocol

# Not part of the default install, which would compile four architectures on every laptop.
cuda: $(PACKAGE) $(TOOLS) ## build the library for GPUs (a minute), print what its kernels take
	(PATH=$$PATH:/usr/local/cuda/bin; test -n "$$CUDACXX" || command -v nvcc) \
	  || $(RUN) -m pip install --quiet --editable '.[cuda-build]'
	$(CONFIGURE) -B build/cuda -DJAX_EP_CUDA=ON -DJAX_EP_WERROR=ON '-DJAX_EP_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)'
	$(BIN)/cmake --build build/cuda --target jax_ep_cuda
	$(RUN) ffi/cuda/resources.py table build/cuda
	install build/cuda/cuda/libjax_ep_cuda.so $(CUDA_LIBRARY)

docs: $(PACKAGE) $(VENV)/.docs ## make a site of the documentation, in build/docs
	$(BIN)/sphinx-build --quiet --fail-on-warning --fresh-env -c docs/site -d build/docs.cache . build/docs
	@echo "See build/docs/index.html"

wheel: $(WHEEL_TOOLS) ## build a release's files: wheels for Linux, whatever compiler is here, and the sources
	rm -rf build/wheels
	$(<D)/bin/python .ci/build_wheels.py build/wheels

# On a GPU machine, benchmarks/gpu.sh; with several GPUs, benchmarks/bench_gpu_mesh.py.
bench: $(PACKAGE) ## check, then time the exchange and the grouped matmul on the CPU
	set -e; for script in $(filter-out %/bench_gpu.py %/bench_gpu_mesh.py,$(wildcard benchmarks/bench_*.py)); do $(RUN) $$script; done

clean: ## remove what make made
	rm -rf $(VENV) build .coverage .coverage.* $(LIBRARY) $(CUDA_LIBRARY)

$(RUN):
	$(PYTHON) -m venv $(VENV)

# An editable install puts the library next to the Python files, for every $(VENV) at once.
$(PACKAGE): pyproject.toml $(NATIVE_SOURCES) $(if $(wildcard $(LIBRARY)),,FORCE) | $(RUN)
	$(RUN) -m pip install --quiet --editable '.[flax,test,examples]' $(PIP_ARGS)
	touch $@

$(TOOLS): pyproject.toml | $(RUN)
	$(call install_extra,$(VENV),dev)
	touch $@

$(VENV)/.docs: pyproject.toml | $(RUN)
	$(call install_extra,$(VENV),docs)
	touch $@

$(WHEEL_TOOLS): pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(call install_extra,$(@D),wheel)
	touch $@

$(TRAINERS)/.installed: tests/with_trainers/requirements.txt
	$(TRAINERS_PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --no-deps --no-compile --requirement $<
	touch $@

CMAKE_FILES := ffi/CMakeLists.txt tests/native/CMakeLists.txt $(wildcard ffi/cuda/*.txt ffi/cuda/*.cmake)

build/lint/compile_commands.json: $(CMAKE_FILES) $(PACKAGE) $(TOOLS)
	$(CONFIGURE) -B build/lint -DJAX_EP_CUDA=AUTO -DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON

build/lint-kernels/compile_commands.json: $(CMAKE_FILES) $(PACKAGE) $(TOOLS)
	$(CONFIGURE) -B build/lint-kernels -DJAX_EP_NATIVE_TESTS=ON -DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON

build/native-address: SANITIZE := address,undefined
build/native-thread: SANITIZE := thread

build/native-%: FORCE $(PACKAGE) $(TOOLS)
	$(CONFIGURE) -B $@ -DJAX_EP_NATIVE_TESTS=ON -DJAX_EP_WERROR=ON -DJAX_EP_SANITIZE=$(SANITIZE)
	$(BIN)/cmake --build $@ --target native_tests/all
	$(BIN)/ctest --test-dir $@ --output-on-failure --no-tests=error --timeout 300

FORCE:
