# `make` lists the targets. Everything runs in .venv, which is made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

MINUTES ?= 10

.PHONY: help run test lint check bench soak clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

run: $(VENV)/.demo ## the service on DATABASE_URL, or without one the demo
	@if [ -n "$$DATABASE_URL$$PGHOST$$PGHOSTADDR$$PGSERVICE" ] || grep -qsE '^\s*(export\s+)?(DATABASE_URL|PGHOST|PGHOSTADDR|PGSERVICE)\s*=\s*[^[:space:]#]' .env; \
	then exec $(BIN)/listener run; else exec $(BIN)/listener demo; fi

test: $(VENV)/.dev ## the whole suite against an ephemeral Postgres
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test ## what CI runs

bench: $(VENV)/.bench ## the measurements beside peers, tables and plots into _reports/
	$(BIN)/python -m bench

soak: $(VENV)/.dev ## load and random faults for MINUTES (10), into _reports/
	$(BIN)/python -m tests.soak --minutes $(MINUTES)
	$(BIN)/python -m tests.soak kills
	$(BIN)/python -m tests.soak throughput
	$(BIN)/pytest -m soak

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis dist

# Three stamps: the demo needs no linters, the tests no peers, and `make test` after `make run` adds only
# what is missing.
$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.demo

$(VENV)/.bench: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,bench]'
	touch $@ $(VENV)/.dev $(VENV)/.demo
