# Every target uses the environment in .venv, which is made when it is missing and refreshed when
# pyproject.toml or constraints.txt change. The pins matter: without them pip may fetch a torch
# built for another accelerator, gigabytes of it.

PYTHON ?= python3
# `make test PYTHON=python3.12 TORCH=2.12.1` has an environment of its own beside .venv.
VENV   ?= .venv$(if $(filter command,$(origin PYTHON)),-$(notdir $(PYTHON)))$(if $(TORCH),-torch$(TORCH))
PINS   := $(VENV)/constraints.txt
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all test-part check format docs docs-site wheel bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## run examples/quickstart.py
	@$(BIN)/python examples/quickstart.py

test: $(VENV)/.installed ## run the tests, each promise in its smallest form; PYTEST_ARGS="-k split"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not full" $(PYTEST_ARGS)

test-all: $(VENV)/.installed ## run all tests: every model, every combination, random graphs
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup $(PYTEST_ARGS)

test-part: $(VENV)/.installed ## run `make test` and a part of the others: PART=3/12
	@test -n "$(PART)" || { echo "usage: make test-part PART=3/12"; exit 2; }
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --full-part=$(PART) $(PYTEST_ARGS)

check: $(VENV)/.installed ## lint, formatting, types
	@$(BIN)/ruff check
	@$(BIN)/ruff check --quiet --select TID251 autopipe/passes/
	@$(BIN)/ruff format --check
	@$(BIN)/mypy --strict

format: $(VENV)/.installed ## format the code and repair what ruff can repair
	@$(BIN)/ruff check --fix --exit-zero
	@$(BIN)/ruff format

docs: $(VENV)/.installed ## write the generated pages of docs/ anew
	@$(BIN)/python -m tests.support.generated_docs

docs-site: $(VENV)/.installed ## build the documentation into site/, an error for every broken link
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel: $(VENV)/.installed ## build dist/*.tar.gz, and from it dist/*.whl
	@rm -rf dist
	@$(BIN)/python -m build --no-isolation --outdir dist

bench: $(VENV)/.installed-bench ## run one benchmark: NAME=module of benchmarks/, BENCH_ARGS=...
	@test -n "$(NAME)" || { echo "usage: make bench NAME=module [BENCH_ARGS=...]"; exit 2; }
	@$(BIN)/python -m benchmarks.$(NAME) $(BENCH_ARGS)

clean: ## delete what the other targets made, .venv included
	rm -rf .venv .venv-* $(VENV) dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV)"
	@sed '$(if $(TORCH),s/^torch==.*/torch==$(TORCH)/)' constraints.txt > $(PINS)
	@$(PIP) install --editable '.[dev]' -c $(PINS)
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	@$(PIP) install --editable '.[bench]' -c $(PINS)
	@touch $@
