# inti_kernels: `make demo` and `make test` are all that a newcomer needs, with python3, g++ and make on the machine.
# Everything else (torch, cmake, ninja, the formatters) is installed into .venv. `make help` lists the rest.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
# What setup.py does without a C++ compiler; here its absence is an error, unless INTI_NATIVE=auto or off is given.
INTI_NATIVE ?= require
export INTI_NATIVE
GCOV ?= gcov
# As setup.py looks for it.
NVCC ?= $(or $(CUDACXX),$(firstword $(shell command -v $(addsuffix /bin/nvcc,$(CUDA_HOME) $(CUDA_PATH)) nvcc /usr/local/cuda/bin/nvcc)),nvcc)
# Passed on to `make demo` and `make bench` (ARGS), and to pytest (PYTEST_ARGS).
ARGS ?=
PYTEST_ARGS ?=

# Volta's Tensor Cores are compute capability 7.0 and 7.2. The newest torch on the default index has no kernels for
# them; 2.7.1 has, and the Triton that it brings too.
VOLTA_TORCH := 2.7.1
ifndef TORCH
  CAPABILITIES := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null)
  TORCH := $(if $(filter 7.0 7.1 7.2 7.3 7.4,$(CAPABILITIES)),$(VOLTA_TORCH),newest)
endif

BIN := $(VENV)/bin
VENV_PYTHON := $(BIN)/python
PIP := $(VENV_PYTHON) -m pip --disable-pip-version-check
CMAKE := $(BIN)/cmake
CONFIGURE = $(CMAKE) -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPython_EXECUTABLE=$(abspath $(VENV_PYTHON))

CXX_SOURCES = $(shell find csrc python benchmarks -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.inc')
NATIVE_INPUTS = $(CXX_SOURCES) $(shell find csrc python -type d) csrc/build_info.h.in csrc/cuda.cmake
OP_TESTS = $(VENV_PYTHON) -m pytest -q -o addopts= -n auto \
    tests/test_pair_interpolate.py tests/test_depthwise_conv3d.py tests/test_token_features.py \
    tests/test_interpolation_head.py tests/test_class_levels.py tests/test_cpu.py tests/test_native.py
# With INTI_CUDA_LIBRARY, all these are tests of the emulated CUDA backend.
CUDA_TESTS = $(VENV_PYTHON) -m pytest -q -o addopts= $(wildcard tests/test_cuda_emulated.py tests/test_cuda_launches.py tests/test_cuda_sizes.py) \
    tests/test_pair_interpolate.py tests/test_depthwise_conv3d.py tests/test_token_features.py \
    tests/test_interpolation_head.py tests/test_class_levels.py tests/test_inti.py
# What of them says nothing more on another build of the kernels, and waits for a compiler.
NO_COMPILER := not compile and not export and not opcheck
# The emulated module of a build folder, and the lines that a build folder's tests executed.
emulated = $$(echo $(CURDIR)/$(1)/_cuda*.so)
covered = $(BIN)/gcovr --gcov-executable $(GCOV) --root . --object-directory $(1) --filter $(2) --merge-lines \
    --gcov-ignore-parse-errors negative_hits.warn_once_per_file \
    --gcov-ignore-parse-errors suspicious_hits.warn_once_per_file --txt-metric line --txt - --fail-under-line 95 $(1)

# Stamps: what is installed, by what it depends on. A torch of another version takes the place of the one before.
VENV_STAMP := $(VENV)/.stamp-venv
TORCH_STAMP := $(VENV)/.stamp-torch-$(TORCH)
PACKAGES_STAMP := $(VENV)/.stamp-packages
# The kernels, by what setup.py builds them by: INTI_CUDA=on after a build without is work to do, and so is a new nvcc.
NATIVE_CHOICES := $(foreach name,INTI_NATIVE INTI_CPU_ISAS INTI_CUDA INTI_CUDA_ARCHS TORCH_CUDA_ARCH_LIST CUDACXX NVCC,$(name)=$($(name)))
NATIVE_STAMP := $(VENV)/.stamp-native-$(firstword $(shell cksum <<< '$(NATIVE_CHOICES)'))

say = @printf '\n== %s\n' "$(1)"

# Every Triton that the kernels are compiled with: those that torch 2.7 (V100's), 2.9, 2.14 and the next bring.
TRITONS ?= 3.3.1 3.5.1 3.8.0 3.9.0
TRITON_FOLDER := build/triton-versions

# What compiles for sm_70 without nvcc, and the disassembler that reads it (tests/cuda_aot.py).
NVRTC := build/nvrtc/nvidia/cuda_nvrtc/lib/libnvrtc.so.12
DISASSEMBLER := $(TRITON_FOLDER)/3.3.1/triton/backends/nvidia/bin/nvdisasm

.PHONY: help install demo test lint unit emulator triton triton-check triton-tests triton-compile cuda cuda-check \
    cuda-tests cuda-compile cuda-model coverage test-slow sanitize test-mutants test-triton-versions test-nvcc test-full bench format clean

help: ## list the targets
	@echo "usage: make TARGET [TORCH=2.7.1] [ARGS='--frames 16']    torch here: $(TORCH)"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# --- Installing -----------------------------------------------------------------------------------------------------

$(VENV_STAMP):
	$(call say,Creating $(VENV))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "Python 3.10 or newer is needed, and $(PYTHON) is $$($(PYTHON) --version 2>&1); name another with PYTHON="; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	    { echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@if [ "$(INTI_NATIVE)" = require ]; then \
	    command -v $(firstword $(CXX)) >/dev/null || \
	        { echo "No C++ compiler: $(CXX) was not found; install g++, name one with CXX=, or go without: INTI_NATIVE=off"; exit 1; }; \
	    $(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("platinclude"), "Python.h")))' || \
	        { echo "The header Python.h was not found; on Debian and Ubuntu: apt-get install python3-dev"; exit 1; }; \
	fi
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	@touch $@

$(TORCH_STAMP): | $(VENV_STAMP)
	$(call say,Installing torch ($(TORCH)))
	$(PIP) install $(if $(filter newest,$(TORCH)),--upgrade torch torchvision,torch==$(TORCH) torchvision)
	@rm -f $(VENV)/.stamp-torch-*
	@touch $@

$(PACKAGES_STAMP): pyproject.toml setup.py $(TORCH_STAMP)
	$(call say,Installing what the build and the tests and the demo need)
	$(PIP) install --upgrade setuptools cmake ninja pybind11
	INTI_NATIVE=off INTI_CUDA=off $(PIP) install --no-build-isolation -e '.[test,demo,bench]'
	@touch $@

$(NATIVE_STAMP): $(PACKAGES_STAMP) CMakeLists.txt inti_kernels/_version.py $(NATIVE_INPUTS)
	$(call say,Building the kernels)
	$(VENV_PYTHON) setup.py --quiet build_ext --inplace
	@rm -f $(VENV)/.stamp-native*
	@touch $@

install: $(NATIVE_STAMP) ## create .venv, install everything into it and build the kernels

# --- Using ----------------------------------------------------------------------------------------------------------

demo: install ## the main job, on a real clip: Naive, InTI and FusedInTI (ARGS="--model vit_l_14 …")
	$(call say,Demo)
	$(VENV_PYTHON) -m inti_kernels demo $(ARGS)

bench: install ## time every op and the module against plain PyTorch (ARGS="--dtype bfloat16 …")
	$(call say,Benchmarks)
	$(VENV_PYTHON) -m inti_kernels bench $(ARGS)

# --- Testing --------------------------------------------------------------------------------------------------------

test: install ## lint, unit, triton, cuda and coverage
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory unit
	@$(MAKE) --no-print-directory triton
	@$(MAKE) --no-print-directory cuda
	@$(MAKE) --no-print-directory coverage

lint: install ## ruff and clang-format, nothing changed
	$(call say,Lint)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

# Threads beside those of pytest would only wait for each other; what needs two asks for them.
unit: install ## the fast tests, shared out over the cores (PYTEST_ARGS="-k conv -x")
	$(call say,Tests)
	OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -n auto tests $(PYTEST_ARGS)

test-slow: install ## the tests that take minutes, which `make test` leaves out
	$(call say,Slow tests)
	$(VENV_PYTHON) -m pytest -m slow tests $(PYTEST_ARGS)

# Without a GPU: the kernels run in Triton's interpreter, and are compiled for every architecture by the Triton at hand.
triton: install ## the Triton kernels: tested in the interpreter, compiled for sm_70 and sm_90
	@$(MAKE) --no-print-directory triton-tests
	@$(MAKE) --no-print-directory triton-compile

# The interpreter is Python and uses one core; the tests are shared out over the cores there are.
triton-check: install ## the rows of `check` in Triton's interpreter
	$(call say,Triton: check in the interpreter)
	INTI_BACKEND=triton TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(VENV_PYTHON) -m inti_kernels check

triton-tests: install
	$(call say,Triton: tests in the interpreter)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -n auto \
	    tests/test_pair_interpolate.py tests/test_depthwise_conv3d.py tests/test_token_features.py \
	    tests/test_interpolation_head.py tests/test_triton_interpreted.py tests/test_convergence.py $(PYTEST_ARGS)

triton-compile: install
	$(call say,Triton: compiling ahead of time)
	$(VENV_PYTHON) tests/triton_aot.py --arch 70 90

# All five architectures, with every version. A version stands in a folder of its own, before the installed one on the path.
test-triton-versions: install ## compile the Triton kernels with every supported Triton (TRITONS="3.3.1 …")
	@for version in $(TRITONS); do \
	    folder=$(TRITON_FOLDER)/$$version; \
	    printf '\n== Triton %s\n' $$version; \
	    [ -d $$folder/triton ] || \
	        $(PIP) install --quiet --no-deps --target $$folder triton==$$version || exit 1; \
	    PYTHONPATH=$$folder $(VENV_PYTHON) tests/triton_aot.py || exit 1; \
	done

# Without a GPU: the kernels run in the emulator, and are compiled for sm_70, 75 and 90.
cuda: install ## the CUDA kernels: checked and tested in the emulator, their coverage, compiled for sm_70 to sm_90
	@$(MAKE) --no-print-directory cuda-check
	@$(MAKE) --no-print-directory cuda-tests
	@$(MAKE) --no-print-directory cuda-compile

# It counts the lines it executes: that costs the tests next to nothing, and saves a second build.
emulator: install ## build the CUDA kernels for the CPU, into build/emulator
	$(call say,Emulator: building)
	$(CONFIGURE) -B build/emulator -DINTI_EMULATOR=ON -DINTI_COVERAGE=ON --log-level=WARNING
	$(CMAKE) --build build/emulator --target cuda_emulated

cuda-check: emulator
	$(call say,CUDA: check in the emulator)
	INTI_BACKEND=cuda INTI_CUDA_LIBRARY="$(call emulated,build/emulator)" OMP_NUM_THREADS=1 \
	    $(VENV_PYTHON) -m inti_kernels check

# The emulator uses one core; the tests are shared out over the cores there are.
cuda-tests: emulator
	@find build/emulator -name '*.gcda' -delete
	$(call say,CUDA: tests in the emulator)
	INTI_CUDA_LIBRARY="$(call emulated,build/emulator)" OMP_NUM_THREADS=1 $(CUDA_TESTS) \
	    tests/test_convergence.py -n auto $(PYTEST_ARGS)
	$(call say,CUDA: coverage of csrc/cuda)
	$(call covered,build/emulator,csrc/cuda/)

# Compiled by the nvcc at hand for architectures that every nvcc from 11.8 on has, and always by NVRTC for sm_70.
cuda-compile: emulator $(NVRTC) $(DISASSEMBLER)
	$(call say,CUDA: compiling and linking for sm_75 and sm_90)
	@if command -v $(NVCC) >/dev/null; then \
	    $(CONFIGURE) -B build/cuda --log-level=WARNING -DINTI_CUDA=ON -DINTI_CUDA_ARCHS='75;90' \
	        -DCMAKE_CUDA_COMPILER="$$(command -v $(NVCC))" && \
	    $(CMAKE) --build build/cuda --target _cuda && \
	    PYTHONPATH=build/cuda $(VENV_PYTHON) -c 'import _cuda; print("imported:", _cuda.build_info())' && \
	    echo "by hand, with nothing but csrc/include:" && \
	    $(NVCC) -std=c++17 -arch=sm_75 -Icsrc/include -c csrc/cuda/pair_interpolate.cu -o build/cuda/by_hand.o; \
	else \
	    echo "not run: no nvcc; CUDACXX or CUDA_HOME names one"; \
	fi
	$(call say,CUDA: compiling ahead of time for sm_70)
	$(VENV_PYTHON) tests/cuda_aot.py
	$(VENV_PYTHON) -m pytest -q -o addopts= tests/test_sass_model.py  # with what was fetched for it here

cuda-model: cuda-compile ## what the CUDA kernels' code should reach on a V100
	$(call say,CUDA: what the code should reach on a V100)
	$(VENV_PYTHON) -m benchmarks.sass_model

$(NVRTC): | $(PACKAGES_STAMP)
	$(PIP) install --quiet --no-deps --upgrade --target build/nvrtc \
	    nvidia-cuda-nvrtc-cu12==12.9.* nvidia-cuda-runtime-cu12==12.9.* nvidia-cuda-nvcc-cu12==12.9.*
	@touch $@

$(DISASSEMBLER): | $(PACKAGES_STAMP)
	$(PIP) install --quiet --no-deps --upgrade --target $(TRITON_FOLDER)/3.3.1 triton==3.3.1
	@touch $@

# The oldest nvcc that is supported, with the newest g++ that it takes: a gigabyte of packages, and minutes of compiling.
test-nvcc: install ## compile and link the CUDA kernels for sm_70 with nvcc 11.8 and g++-11, unpacked into build/
	$(call say,nvcc 11.8: unpacking)
	$(VENV_PYTHON) tests/unpack_nvcc.py build/nvcc-11.8
	$(call say,nvcc 11.8: compiling and linking for sm_70)
	$(CONFIGURE) -B build/cuda-11.8 -DINTI_CUDA=ON -DINTI_CUDA_ARCHS=70 \
	    -DCMAKE_CUDA_COMPILER=$(CURDIR)/build/nvcc-11.8/cuda/bin/nvcc \
	    -DCMAKE_CUDA_HOST_COMPILER=$(CURDIR)/build/nvcc-11.8/root/usr/bin/g++-11 \
	    -DCMAKE_CXX_COMPILER=$(CURDIR)/build/nvcc-11.8/root/usr/bin/g++-11
	$(CMAKE) --build build/cuda-11.8 --target _cuda
	PYTHONPATH=build/cuda-11.8 $(VENV_PYTHON) -c 'import _cuda; print("imported:", _cuda.build_info())'

# On a build that counts the lines it executes. The op tests go through every instruction set of the machine.
coverage: install ## the op tests, and how many lines of the C++ kernels they execute: 95 % or more
	$(call say,Coverage of csrc/cpu: building)
	$(CONFIGURE) -B build/coverage -DINTI_COVERAGE=ON
	$(CMAKE) --build build/coverage
	@find build/coverage -name '*.gcda' -delete
	$(call say,Coverage of csrc/cpu: the op tests)
	INTI_NATIVE_LIBRARY="$$(echo $(CURDIR)/build/coverage/_native*.so)" OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=lines \
	    $(OP_TESTS) -k '$(NO_COMPILER)'
	$(call say,Coverage of csrc/cpu)
	$(call covered,build/coverage,csrc/cpu/)

# torch and Python are not sanitized: the runtime of AddressSanitizer has to be there before them, and libstdc++ with
# it, so that it sees the exceptions. Leaks are not looked for: Python's own would drown ours.
SANITIZED = LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1

sanitize: install ## the op tests on builds with AddressSanitizer and UBSan
	$(call say,Sanitizers: building)
	$(CONFIGURE) -B build/sanitize -DINTI_SANITIZE=address,undefined -DINTI_EMULATOR=ON -DCMAKE_CXX_COMPILER=g++
	$(CMAKE) --build build/sanitize
	$(call say,Sanitizers: the op tests)
	INTI_NATIVE_LIBRARY="$$(echo $(CURDIR)/build/sanitize/_native*.so)" $(SANITIZED) \
	    $(OP_TESTS) -k '$(NO_COMPILER)'
	$(call say,Sanitizers: the op tests in the emulator)
	INTI_CUDA_LIBRARY="$(call emulated,build/sanitize)" HYPOTHESIS_PROFILE=mutants $(SANITIZED) \
	    OMP_NUM_THREADS=1 $(CUDA_TESTS) -n auto -k '$(NO_COMPILER) and not traffic'  # which has real sizes
	$(call say,Sanitizers: the standalone programs)
	g++ -std=c++17 -O1 -g -fsanitize=address -Wno-psabi -Wno-unknown-pragmas -DINTI_EMULATED -Icsrc/include -Icsrc \
	    benchmarks/standalone/*.cpp -x c++ csrc/cuda/*.cu -o build/sanitize/standalone
	ASAN_OPTIONS=detect_leaks=0 build/sanitize/standalone float16 float32
	ASAN_OPTIONS=detect_leaks=0 build/sanitize/standalone --capability 80 bfloat16

test-mutants: install ## plant one-line faults in the C++, Triton and CUDA kernels and see each caught (SUITE="cuda gemm")
	$(call say,Mutants)
	$(VENV_PYTHON) tests/mutants.py $(if $(SUITE),--suite '$(SUITE)')

test-full: install ## all of these and a wheel beside several torches; hours; writes FULL_RESULTS.md (STEPS="sanitize test-nvcc" runs these only)
	$(VENV_PYTHON) tests/full.py $(STEPS)

# --- Keeping house --------------------------------------------------------------------------------------------------

format: install ## apply ruff and clang-format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

clean: ## remove what was built (.venv stays)
	rm -rf build dist *.egg-info inti_kernels/_native*.so inti_kernels/_cuda*.so inti_kernels/_build.json .pytest_cache .ruff_cache .hypothesis
	rm -f $(VENV)/.stamp-native*
	find . -path ./$(VENV) -prune -o -name __pycache__ -prune -exec rm -rf {} +
