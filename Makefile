# `make demo` and `make test` set everything up in .venv and run; set-up is skipped while pyproject.toml stays the same.
#   PYTHON=...  the Python (3.11 to 3.13) to build .venv from; test-cuda and bench-cuda run on it as it is
#   OUT=...     the folder where test-cuda and bench-cuda write what they found, instead of bench/results and the README
#   FOR=...     the Python of the machine with a card, e.g. FOR=3.12, for which `wheels` downloads
#   TORCH=...   the PyTorch that test-torch installs, e.g. TORCH=torch==2.13.0; pip's newest may bring gigabytes for CUDA
#   ARGS=...    passed on, e.g. make test ARGS="tests/kernels -x"

.DEFAULT_GOAL := help
.PHONY: help demo test test-torch test-cuda12 wheels test-cuda bench bench-cuda report lint format clean
.SILENT:
.NOTPARALLEL: # nothing runs beside a race
# A failed test keeps no race from being run, which looks itself at what is right; make fails in the end all the same.
ifneq ($(filter bench-cuda,$(MAKECMDGOALS)),)
MAKEFLAGS += -k
endif

BIN := .venv/bin
ARGS ?=
TORCH ?= torch
REPORT = $(BIN)/python -m fastsepconv.bench.report
setup = PYTHON='$(PYTHON)' sh scripts/setup.sh

help: ## this list
	awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: ## set up, then train Xception on real images and show that it equals Keras
	$(setup) tensorflow,demo
	$(BIN)/fastsepconv demo $(ARGS)

test: ## set up, then run the tests
	$(setup) tensorflow,demo test
	$(BIN)/pytest $(ARGS)

test-torch: ## set up .venv-torch, without TensorFlow, then run the tests of Keras on PyTorch
	$(setup) torch,demo test .venv-torch '$(TORCH)'
	OMP_WAIT_POLICY=passive KERAS_BACKEND=torch .venv-torch/bin/pytest $(or $(ARGS),tests/bridge/test_torch_*.py)

test-cuda12: ## set up .venv-cuda12, then test with CUDA 12 what compiles and starts the CUDA kernels, without a card
	$(setup) cuda12 cuda12 .venv-cuda12
	.venv-cuda12/bin/pytest $(or $(ARGS),$(addprefix tests/kernels/cuda/test_,assembly.py fast_assembly.py launch.py fast_tier.py))

wheels: ## download what the training and the race of networks want on a machine with a card; FOR=3.12, its Python
	$(or $(PYTHON),python3) scripts/wheels.py $(if $(FOR),--python $(FOR)) $(ARGS)

test-cuda: ## on a machine with a card: test the CUDA kernels with PYTHON (python3) as it is, setting nothing up
	$(or $(PYTHON),python3) scripts/on_card.py test $(ARGS)

bench-cuda: ## the same: race the CUDA kernels against cuDNN and cuBLAS
	$(or $(PYTHON),python3) scripts/on_card.py bench $(or $(ARGS),--quick)

bench: ## set up, then race against TensorFlow and the other runtimes
	$(setup) tensorflow,demo,bench test
	$(BIN)/pytest bench --benchmark-only $(ARGS)

# One report a table: the races of one machine, but for those of another dtype.
races = $(filter-out %bfloat16-$(1)-2cores.json,$(sort $(wildcard bench/results/*-$(1)-*.json)))
OTHERS = --readme bench/results/README.md
report: ## set up, then make the tables and pictures of races on CPUs anew, from bench/results
	$(setup) tensorflow,demo
	$(REPORT) $(call races,graniterapids) --readme README.md --figures bench/results
	$(REPORT) bench/results/xception-bfloat16-graniterapids-2cores.json --readme README.md --marker bench-bfloat16 --figures bench/results
	$(REPORT) $(call races,zen5) --readme README.md --marker bench-avx512 --figures bench/results/zen5
	$(REPORT) bench/results/xception-bfloat16-zen5-2cores.json $(OTHERS) --marker bench-zen5-bfloat16 --figures bench/results/zen5
	$(REPORT) $(call races,zen4) $(OTHERS) --marker bench-zen4 --figures bench/results/zen4
	$(REPORT) $(call races,emeraldrapids) $(OTHERS) --marker bench-emeraldrapids --figures bench/results/emeraldrapids
	$(REPORT) bench/results/xception-bfloat16-zen4-2cores.json $(OTHERS) --marker bench-zen4-bfloat16 --figures bench/results/zen4
	$(REPORT) $(call races,zen4avx2) $(OTHERS) --marker bench-zen4-avx2 --figures bench/results/zen4avx2
	$(REPORT) $(call races,zen3) $(OTHERS) --marker bench-zen3 --figures bench/results/zen3

lint: ## set up, then check style and types
	$(setup) tensorflow,demo lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(ARGS)

format: ## set up, then put the sources into their form
	$(setup) tensorflow,demo lint
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean: ## remove the environments and what the tools left behind
	rm -rf .venv .venv-torch .venv-cuda12 build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache .benchmarks *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
