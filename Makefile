# Every target first makes sure that .venv is what the locks say; see CONTRIBUTING.md.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
# The targets start dozens of Pythons: without bytecode caches each would compile torch and SGLang again. Images often
# set this.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3.11
# More test processes than cores: they wait for each other and for time to pass.
TEST_JOBS ?= 3
# Overrides for the recipe, e.g. `make demo ARGS="steps=20 learner.tensor_parallel=1"`.
ARGS ?=

# What `make bench-loss` and `make bench-step` run on: cpu or cuda.
DEVICE ?= cpu

# For `make test-gpu`: .venv holds a torch without CUDA, so this is an environment of your own.
GPU_PYTHON ?= python3

BIN := .venv/bin
UV_VERSION := 0.13.8
UNIT := not real and not many and not gpu and not slow and not ci
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 18

.PHONY: install
install: ## Install .venv from the locks (skipped when it is current)
	@PYTHON=$(PYTHON) scripts/install.sh

.PHONY: demo
demo: install ## Run the demo recipe: a tiny student learns from a tiny teacher
	@$(BIN)/opd run demo $(ARGS)

.PHONY: test
test: install-launch slurm ## Run the CPU suite; `make test-ci` is what CI adds
	$(PYTEST) tests/unit -m "$(UNIT)" -n $(TEST_JOBS)
	$(PYTEST) tests/real $$(grep -rlE "mark\.(real|many)\b" tests/unit) -m "(real or many) and not gpu and not slow and not ci and not transformer_engine" -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder --durations=10

.PHONY: test-ci
test-ci: install-launch slurm ## Run what CI adds: whole Slurm jobs through dead nodes, hangs and pre-emption; hundreds of kills
	$(PYTEST) $$(grep -rl "mark\.ci\b" tests) -m ci -n $(TEST_JOBS) --dist worksteal --durations=10

.PHONY: test-slow
test-slow: install-launch ## Run the tests that take minutes each
	@scripts/install_slurm.sh ssh
	$(PYTEST) -m "slow and not gpu and not transformer_engine" --durations=0

.PHONY: test-megatron-latest
test-megatron-latest: ## Run the learner's tests on the newest Megatron-Core (Python 3.12, own environment)
	@scripts/megatron_latest.sh $(ARGS)

.PHONY: test-gpu
test-gpu: ## Run loss and learner on one CUDA device; GPU_PYTHON has torch, triton, pytest (learner: Megatron-Core and Transformer Engine)
	@$(GPU_PYTHON) -c "import importlib.util as u, sys; lacks = [n for n in ('pytest', 'torch', 'triton') if u.find_spec(n) is None]; lacks and sys.exit('make test-gpu: NOTHING WAS RUN: %s lacks %s; name a Python that has them: make test-gpu GPU_PYTHON=/path/to/python' % (sys.executable, ', '.join(lacks)))"
	$(GPU_PYTHON) -m pytest -q tests/gpu --durations=10

.PHONY: check
check: install ## Lint, format, types, import layers, unit tests: 90 s on two cores
	@$(MAKE) -j2 lint unit TEST_JOBS=2

.PHONY: lint
lint: install ## Lint, format, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

.PHONY: unit
unit: install ## Unit tests
	$(PYTEST) tests/unit -m "$(UNIT)" -n $(TEST_JOBS)

.PHONY: format
format: install ## Apply the formatter and the safe lint fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: golden
golden: install ## Write again what recipes resolve to and say: tests/golden, recipes/, docs/recipes.md; read the diff
	$(BIN)/python scripts/golden.py

.PHONY: bench-loss
bench-loss: install ## Measure the loss against the packaged peers; DEVICE=cuda where there is one (ARGS=--quick)
	@benchmarks/peers.sh
	$(BIN)/python -m benchmarks.loss --device $(DEVICE) --write-docs $(ARGS)

.PHONY: bench-transport
bench-transport: install ## Measure what a teacher's scores cost to send: bytes and seconds a token by K (ARGS='--run RUN', ARGS=--quick)
	$(BIN)/python -m benchmarks.transport --write-docs $(ARGS)

.PHONY: bench-step
bench-step: install ## Measure the learner's step against bare Megatron and its memory against the estimate (ARGS=--quick)
	$(BIN)/python -m benchmarks.step --device $(DEVICE) --write-docs $(ARGS)

.PHONY: bench-planner
bench-planner: install ## Measure what the planner predicts: whole runs and learner memory on a CPU
	$(BIN)/python -m benchmarks.planner runs $(ARGS)
	$(BIN)/python -m benchmarks.planner memory $(ARGS)
	$(BIN)/python -m benchmarks.planner report --write-docs

.PHONY: bench-overlap
bench-overlap: install ## Train the demo in every overlap mode: seconds per step, age, accuracy (ARGS=--quick)
	$(BIN)/python -m benchmarks.overlap --write-docs $(ARGS)

.PHONY: install-launch
install-launch: ## Add NeMo-Run to .venv (the extra `launch`); the tests of `opd submit` want it
	@PYTHON=$(PYTHON) scripts/install.sh launch

.PHONY: slurm
slurm: ## Install Slurm's Debian packages for the tests, where that is possible
	@scripts/install_slurm.sh

.PHONY: uv
uv: install
	@[[ "$$($(BIN)/uv --version 2>/dev/null)" == "uv $(UV_VERSION) "* ]] || $(BIN)/python -m pip install -q --no-compile uv==$(UV_VERSION)

.PHONY: lock
lock: uv ## Resolve locks/*.lock again, keeping versions (ARGS=--upgrade takes newer ones)
	$(BIN)/python scripts/lock.py $(ARGS)

.PHONY: production-pins
production-pins: uv ## Prove that the production pins resolve, for x86_64 and aarch64, from metadata alone
	$(BIN)/python scripts/production_pins.py $(ARGS)

.PHONY: clean
clean: ## Remove .venv and caches; runs/ stays
	rm -rf .venv .venv-peers .venv-megatron-latest build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
