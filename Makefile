# From a fresh clone with Python 3.10 or newer and make; every target does its own set-up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INTEROP ?= .venv-interop
IN_VENV = PATH=$(abspath $(BIN)):$$PATH
SUITE ?= evals/paper.yaml
OUTPUT ?= scores/eval
TEST_JOBS ?= 2
FUZZ_SECONDS ?= 600
# Where `make faults` writes: where syncing takes no time, if there is such a place.
IN_MEMORY ?= $(firstword $(wildcard /dev/shm) /tmp)
# Most modules that are installed are never imported. To compile all takes more than a minute, so Python
# compiles each when it is first imported, and keeps it.
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo demo-minilm eval eval-paper study study-peft paper-table2 paper-table3 \
	evidence search-language weight-tables test test-gpu test-interop test-llama-cpp \
	faults fuzz parity check docs release-check bench bench-check bench-gpu \
	bench-fusion-bench clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 12

install: $(VENV)/.package ## the package alone, without torch: .venv/bin/outliermerge merges, verifies, measures

demo: $(VENV)/.eval ## the paper in five minutes: merge a small LLaVA family, score all, show the table
	@$(IN_VENV) $(BIN)/python evals/demo.py

demo-minilm: $(VENV)/.demo ## merge a real model and its real fine-tune, verify, compare them
	@$(IN_VENV) $(BIN)/python demo/minilm.py

eval: $(VENV)/.eval ## score a model: MODEL=… [SUITE=evals/paper.yaml] [LIMIT=…] [OUTPUT=scores/eval]
	@test -n "$(MODEL)" || { echo "error: name a model: make eval MODEL=merged/llava_math" >&2; exit 2; }
	@$(IN_VENV) outliermerge eval $(MODEL) --suite $(SUITE) --output $(OUTPUT) $(if $(LIMIT),--limit $(LIMIT))

eval-paper: $(VENV)/.eval ## the paper's Table 4, merges and scores (needs a GPU and the hub) [LIMIT=…]
	@$(IN_VENV) $(BIN)/python evals/paper.py $(if $(LIMIT),--limit $(LIMIT))

study: $(VENV)/.eval ## train, merge and score the small family for five seeds in two regimes (an hour)
	@$(IN_VENV) $(BIN)/python evals/family/study.py

study-peft: $(VENV)/.dev ## train a real encoder by noise, LoRA and LoRA with a scale (ten minutes)
	@$(IN_VENV) $(BIN)/python evals/peft/study.py

paper-table2: $(VENV)/.paper ## the paper's Table 2, noise in DeBERTaV3 on GLUE (needs a GPU and the hub) [ARGS=--small]
	@$(IN_VENV) $(BIN)/python evals/peft/table2.py $(ARGS)

paper-table3: $(VENV)/.paper ## the paper's Table 3, LoRA with a scale in a Llama (needs a GPU and the hub) [ARGS=--small]
	@$(IN_VENV) $(BIN)/python evals/peft/table3.py $(ARGS)

evidence: $(VENV)/.dev ## train, merge and score three families of models for five seeds (many hours)
	@$(IN_VENV) $(BIN)/python evals/evidence/run.py vision
	@$(IN_VENV) $(BIN)/python evals/evidence/run.py language
	@$(IN_VENV) $(BIN)/python evals/evidence/run.py encoder
	@$(IN_VENV) $(BIN)/python evals/evidence/results.py
	@$(IN_VENV) $(BIN)/python evals/evidence/page.py

search-language: $(VENV)/.dev ## search merges of small language models, and confirm on other pages (half an hour)
	@$(IN_VENV) $(BIN)/python evals/evidence/search_language.py

weight-tables: $(VENV)/.dev ## the paper's tables on real weights; trains ten adapters (fifteen minutes)
	@$(IN_VENV) $(BIN)/python evals/weights/tables.py

test: $(VENV)/.dev $(VENV)/.eval $(VENV)/.browser $(VENV)/.slurm ## run the tests
	@$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder

test-gpu: $(VENV)/.dev ## run the tests that need a CUDA device
	@$(BIN)/python -m pytest -m gpu

test-interop: $(INTEROP)/.ready ## run the tests inside FusionBench, in an environment of its own
	@$(INTEROP)/bin/python -m pytest -m interop tests/interop

test-llama-cpp: $(VENV)/.dev ## run the tests with llama.cpp's converter: of LLAMA_CPP, or fetched once (77 MB)
	@$(BIN)/python -m pytest -m llama_cpp tests/output

faults: $(VENV)/.dev $(VENV)/.browser ## all hostile inputs, failures, kills, races and tables of cases, of which `make test` runs a sample
	@$(IN_VENV) TMPDIR=$(IN_MEMORY) $(BIN)/python -m pytest -m faults -n $(TEST_JOBS) --dist worksteal \
	-o tmp_path_retention_policy=failed

fuzz: $(VENV)/.dev ## the three fuzzers with new inputs, for ten minutes each [FUZZ_SECONDS=600]
	@$(BIN)/python tests/hostile/fuzz.py --seconds $(FUZZ_SECONDS)

parity: $(VENV)/.dev ## merge 500 random specs by mergekit, too, and write docs/studies/parity.md (15 minutes)
	@$(IN_VENV) $(BIN)/python tests/parity/report.py

check: $(VENV)/.dev $(VENV)/.eval ## ruff, mypy strict, and the layers of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

docs: $(VENV)/.docs ## build the documents as a site in docs/_build, from the pages in docs/ and the code
	@$(BIN)/python docs/reference.py --write
	@$(BIN)/python -m sphinx -E -q -W --keep-going -b html docs docs/_build
	@echo "open docs/_build/index.html"

release-check: docs $(VENV)/.dev $(VENV)/.eval $(VENV)/.release ## build and try what a release has, into dist/ [RELEASE=--final]
	@$(BIN)/python release/check.py $(RELEASE)

bench: $(VENV)/.dev ## measure against a plain copy, mergekit and peft (needs 26 GB of disk, about an hour)
	@$(IN_VENV) $(BIN)/python benchmarks/suite.py
	@$(IN_VENV) $(BIN)/python benchmarks/inputs.py
	@$(IN_VENV) $(BIN)/python benchmarks/looking.py
	@$(IN_VENV) $(BIN)/python benchmarks/elsewhere.py
	@$(IN_VENV) $(BIN)/python benchmarks/tables.py --write

bench-check: $(VENV)/.dev ## measure the 0.5B merges again; fail if a ratio became 25% worse
	@new=$$(mktemp -d) && trap 'rm -rf "$$new"' EXIT && \
	$(BIN)/python benchmarks/suite.py --runs 3 --only 0.5B-2 --results "$$new/speed.json" && \
	$(BIN)/python benchmarks/check.py "$$new/speed.json"

bench-gpu: $(VENV)/.dev ## measure on a CUDA device: from disk, on the device, against mergekit --cuda
	@$(IN_VENV) $(BIN)/python benchmarks/gpu.py

bench-fusion-bench: $(INTEROP)/.ready ## measure methods on matrices beside FusionBench's [ARGS="--size 1.5B --layers 1"]
	@$(INTEROP)/bin/python benchmarks/matrices.py $(ARGS)

clean: ## remove the virtual environments and what demo wrote
	rm -rf $(VENV) $(INTEROP) models merged scores evals/data/tiny docs/_build dist

$(BIN)/python:
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.package: pyproject.toml constraints.txt | $(BIN)/python
	@echo "setting up $(VENV) (once)"
	@$(INSTALL) -e .
	@touch $@

# Extras are asked of the installed package: by `-e` its kernels would be compiled for each target.
$(VENV)/.demo: $(VENV)/.package
	@echo "setting up $(VENV) for the demo (once)"
	@$(INSTALL) 'outliermerge[demo]'
	@touch $@

# lmms-eval's own list of needs brings a torchvision that a CPU build of torch cannot load.
$(VENV)/.eval: $(VENV)/.package evals/requirements-cpu.txt
	@echo "setting up $(VENV) for evaluations (once)"
	@$(INSTALL) 'outliermerge[eval-text,family,torch]' -r evals/requirements-cpu.txt
	@$(INSTALL) --no-deps lmms-eval==0.7.3
	@touch $@

# The evaluations and FusionBench cannot share an environment: constraints-interop.txt says why.
$(INTEROP)/.ready: pyproject.toml constraints.txt constraints-interop.txt
	@echo "setting up $(INTEROP) (once)"
	@$(PYTHON) -m venv $(INTEROP)
	@grep -v '^antlr4' constraints.txt | cat - constraints-interop.txt >$(INTEROP)/constraints.txt
	@$(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check \
	-c $(INTEROP)/constraints.txt -e '.[interop]'
	@touch $@

# The report's tests open it in Chromium.
$(VENV)/.browser: | $(BIN)/python
	@command -v chromium >/dev/null || { \
	echo "setting up Chromium (once)"; \
	admin=$$(test $$(id -u) -eq 0 || echo sudo); \
	install="$$admin env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium"; \
	{ $$install || { $$admin apt-get update -qq && $$install; }; } >/dev/null 2>&1 || \
	{ echo "error: make test needs chromium on PATH, and apt-get could not install it" >&2; exit 1; }; }
	@touch $@

# The scripts for Slurm are tried by a real one where it can be installed, else by plain processes.
$(VENV)/.slurm: | $(BIN)/python
	@command -v slurmctld >/dev/null || test -x /usr/sbin/slurmctld || { \
	echo "setting up Slurm for its tests (once)"; \
	admin=$$(test $$(id -u) -eq 0 || echo sudo); \
	install="$$admin env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends munge slurmctld slurmd slurm-client"; \
	{ $$install || { $$admin apt-get update -qq && $$install; }; } >/dev/null 2>&1 || \
	echo "no Slurm here: plain processes carry its scripts out"; }
	@touch $@

$(VENV)/.dev: $(VENV)/.package
	@echo "setting up $(VENV) for development (once)"
	@$(INSTALL) 'outliermerge[demo,dev,docs]'
	@touch $@ $(VENV)/.demo $(VENV)/.docs

$(VENV)/.paper: $(VENV)/.package
	@echo "setting up $(VENV) for the paper's tables (once)"
	@$(INSTALL) 'outliermerge[paper]'
	@touch $@

$(VENV)/.release: $(VENV)/.package
	@echo "setting up $(VENV) for releases (once)"
	@$(INSTALL) 'outliermerge[release]'
	@touch $@

$(VENV)/.docs: $(VENV)/.package
	@echo "setting up $(VENV) for the documents (once)"
	@$(INSTALL) 'outliermerge[docs]'
	@touch $@
