# `make demo` and `make test` set up all they need; the second time they start at once.
SHELL := /bin/bash
VENV := .venv
PYTHON := $(VENV)/bin/python
PIP := $(PYTHON) -m pip --disable-pip-version-check
CSRC := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
LINTED := llmos_kernels benchmarks docs/examples tests tools setup.py
JOBS := $(shell nproc)

.PHONY: help demo test test-quick test-avx2 bench bench-gate page peers lint format build sanitize wheel test-wheels gpu gpu-carry mutants clean

help:
	@echo 'make demo      swap a trained sentence encoder: proofs, outputs, time before and after'
	@echo 'make test      all tests on this machine; at the end what could not run, and the slowest'
	@echo 'make test-quick  those that compare numbers in little time: 2 minutes'
	@echo 'make test-avx2  the same as on a CPU without AVX-512'
	@echo 'make bench     pytest-benchmark against all that is here, threads pinned (BENCH=--quick: 10 minutes)'
	@echo 'make bench-gate  the quick rows against the baseline of this kind of machine, if there is one'
	@echo 'make page      all results as build/page.html, and the figure of the README from the baselines'
	@echo 'make peers     zentorch, onnxruntime, torchao, bitsandbytes in an environment of their own'
	@echo 'make lint      ruff, clang-format, mypy (make format: apply)'
	@echo 'make sanitize  the C++ ops under AddressSanitizer and UndefinedBehaviorSanitizer'
	@echo 'make wheel     a wheel for this Python in dist/ (TORCH_CUDA_ARCH_LIST chooses GPUs)'
	@echo 'make test-wheels  the wheel under other versions of torch and Python: gigabytes, 20 minutes'
	@echo 'make gpu       tests and measurements on a GPU machine, which needs no network (SLICE=tests ...)'
	@echo 'make gpu-carry  compile here what make gpu needs there (PYTHON312=python3.12, CARRY=modules of the pack)'
	@echo 'make mutants   planted faults, each of which tests must see: 8 minutes'

demo: $(VENV)/.built
	@$(PYTHON) -m llmos_kernels demo

test: build
	OMP_WAIT_POLICY=passive $(PYTHON) -m pytest -n $(JOBS) --dist worksteal --durations=20 --durations-min=1

test-quick: build
	OMP_WAIT_POLICY=passive $(PYTHON) -m pytest -n $(JOBS) --dist worksteal -m quick

# Kernels and torch as on a CPU without AVX-512, which most people have.
test-avx2: export LLMOS_CPU_LEVEL = avx2
test-avx2: export ATEN_CPU_CAPABILITY = avx2
test-avx2: export MKL_ENABLE_INSTRUCTIONS = AVX2
test-avx2: export ONEDNN_MAX_CPU_ISA = AVX2
test-avx2: test-quick

# Libraries that cannot share an environment with the rest; the benchmarks ask those that are there.
peers:
	test -x build/peers/bin/python || python3 -m venv build/peers
	build/peers/bin/python -m pip --disable-pip-version-check install -q -r requirements/peers.txt

bench: build
	$(PYTHON) -m llmos_kernels bench $(BENCH)

bench-gate: build
	$(PYTHON) benchmarks/gate.py

page: build
	$(PYTHON) benchmarks/report

lint: $(VENV)/.ready
	$(PYTHON) -m ruff check $(LINTED)
	$(PYTHON) -m ruff format --check $(LINTED)
	find csrc docs/examples tests -name '*.c' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs $(VENV)/bin/clang-format --dry-run --Werror
	$(PYTHON) -m mypy

format: $(VENV)/.ready
	$(PYTHON) -m ruff format $(LINTED)
	$(PYTHON) -m ruff check --fix $(LINTED)
	$(PYTHON) -m ruff format $(LINTED)
	find csrc docs/examples tests -name '*.c' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs $(VENV)/bin/clang-format -i

build: $(VENV)/.ready $(VENV)/.built

$(VENV)/.demo: requirements/demo.txt
	@echo 'installing torch, transformers and a C++ build in $(VENV): about a minute'
	@test -x $(PYTHON) || python3 -m venv $(VENV)
	@$(PIP) install -q -r $<
	@touch $@

$(VENV)/.ready: requirements/tests.txt requirements/bench.txt $(VENV)/.demo
	@echo 'installing what the tests take: about a minute'
	@$(PIP) install -q -r requirements/tests.txt -r requirements/bench.txt
	@touch $@

$(VENV)/.built: $(VENV)/.demo $(CSRC)
	@echo 'compiling the C++ kernels: one to three minutes on two cores'
	@LLMOS_BUILD_EXT=1 LLMOS_EMULATE=1 $(PIP) install -q --no-build-isolation --no-deps -e .
	@touch $@

# The whole package, built anew with sanitizers, beside the tests that run on it.
sanitize: $(VENV)/.ready
	rm -rf build/sanitized
	LLMOS_BUILD_EXT=1 LLMOS_SANITIZE=1 LLMOS_EMULATE=1 $(PIP) install -q --no-build-isolation --no-deps --target build/sanitized .
	LLMOS_SANITIZED=$(CURDIR)/build/sanitized PYTHONPATH=$(CURDIR)/build/sanitized \
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
	OMP_WAIT_POLICY=passive LLMOS_SKIP_TRITON=1 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	$(PYTHON) -P -m pytest -n $(JOBS) --dist worksteal tests/kernels/test_sanitize.py tests/kernels/test_emulated_cuda.py tests/kernels/test_kernels.py tests/ops/test_ops.py tests/ops/test_int8.py tests/ops/test_int8_linear.py \
	  -k "sanitize or emulated_cuda or emulated or guard or matches_reference or layouts or strided or integers or extreme or outliers or rows_of or vnni_weight"

wheel: $(VENV)/.ready
	$(PYTHON) tools/wheel.py

test-wheels: $(VENV)/.ready
	LLMOS_WHEELS=all $(PYTHON) -m pytest -s -v tests/build/test_wheels.py

gpu:
	python3 tools/gpu_session/gpu.py $(SLICE)

# For the Python of the GPU machine, against the torch of requirements/demo.txt, in .gpu-carry.
PYTHON312 := python3.12
gpu-carry:
	$(PYTHON312) tools/gpu_session/gpu_carry.py make --modules $(CARRY)

mutants: build
	$(PYTHON) tests/mutants.py

clean:
	rm -rf build dist *.egg-info llmos_kernels/*.so $(VENV)/.built
