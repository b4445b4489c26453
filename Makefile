# Two commands matter: `make demo` and `make test`; each does the set-up that is missing.
.DEFAULT_GOAL := help
SHELL := /usr/bin/env bash
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo test nightly test-slurm test-other-vllm lint format lock clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: ## Build .venv (GPU build where nvidia-smi finds a GPU, else CPU)
	@deploy/setup.sh

demo: setup ## Train a small model with every real part; about 5 minutes on 2 cores
	@$(BIN)/slipstream run recipes/demo.toml --fresh

test: setup ## Run the tests, real engines included
	@$(BIN)/python -m pytest -q -m "not nightly and not slurm" -n 2 --dist loadfile

nightly: setup ## Run everything, the long tests too
	@tests/slurm/install.sh
	@SLIPSTREAM_EXPLORE=1 PATH="$$PATH:/usr/sbin" $(BIN)/python -m pytest -q

test-slurm: setup ## Start a real Slurm and a real Prometheus here and test on them; installs them when root
	@tests/slurm/install.sh
	@PATH="$$PATH:/usr/sbin" $(BIN)/python -m pytest -q -m "slurm and not nightly"

test-other-vllm: setup ## Prove the weight push on another vLLM release, in an environment of its own (VLLM=0.28.0)
	@tests/nightly/other_vllm.sh $(or $(VLLM),0.28.0)

lint: setup ## Style, format, types, direction of imports
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

format: setup ## Format the code
	@$(BIN)/ruff check --fix-only -q . ; $(BIN)/ruff format .

lock: ## Write constraints/cpu.txt from what .venv holds
	@{ sed -n '/^#/p' constraints/cpu.txt; $(BIN)/python -m pip list --format=freeze \
		| grep -viE '^(slipstream-rl|pip|wheel|setuptools|torch|torchvision|torchaudio|torchcodec)=='; } > constraints/cpu.new
	@mv constraints/cpu.new constraints/cpu.txt

clean: ## Remove run folders and caches (not .venv)
	rm -rf runs .pytest_cache .ruff_cache .hypothesis .mypy_cache .import_linter_cache
