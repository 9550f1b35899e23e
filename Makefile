# From a fresh clone with Python 3.10 or newer and make; every target does its own set-up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu check bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

demo: $(VENV)/.demo ## merge a real model and its real fine-tune, verify, compare them
	@PATH=$(abspath $(BIN)):$$PATH $(BIN)/python demo/demo.py

test: $(VENV)/.dev ## run the tests
	@$(BIN)/python -m pytest

test-gpu: $(VENV)/.dev ## run the tests that need a CUDA device
	@$(BIN)/python -m pytest -m gpu

check: $(VENV)/.dev ## ruff, mypy strict, and the layers of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(VENV)/.dev ## measure against mergekit and peft (needs 16 GB of disk, about 30 minutes)
	@PATH=$(abspath $(BIN)):$$PATH $(BIN)/python benchmarks/against_mergekit.py
	@PATH=$(abspath $(BIN)):$$PATH $(BIN)/python benchmarks/inputs.py

clean: ## remove the virtual environment and what demo wrote
	rm -rf $(VENV) models merged

$(BIN)/python:
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "setting up $(VENV) (once)"
	@$(INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "setting up $(VENV) for development (once)"
	@$(INSTALL) -e '.[demo,dev]'
	@touch $@ $(VENV)/.demo
