# `make` lists the targets. Each makes the virtual environment it needs; PYTHON chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/shapes_resfu
WORKERS ?= auto
BIN := $(VENV)/bin

.PHONY: help install train test notebooks dry-run lint bench targets clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

# The TPU's compiler, for the tests alone: see `targets` in pyproject.toml.
$(VENV)/installed-targets: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -e '.[targets]'
	touch $@

install: $(VENV)/installed  ## make the virtual environment

train: install  ## train ReSFU on the embedded dataset `shapes` (two CPU cores: 4 to 7 minutes with installation)
	$(BIN)/python train.py --config configs/shapes_resfu.py --workdir $(WORKDIR)

test: $(VENV)/installed-targets  ## run all tests (CPU)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

notebooks: install  ## write colab/*.ipynb from colab/*.py, executed (CPU)
	JAX_PLATFORMS=cpu $(BIN)/python -m scripts.notebooks

dry-run: install  ## two steps of every config, on made-up data (CPU)
	JAX_PLATFORMS=cpu $(BIN)/python -m scripts.dry_run

lint: install  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install  ## time the upsamplers and their literal forms; PEER_ROOT=DIR: and the official modules
	$(if $(PEER_ROOT),$(BIN)/python -m pip install --quiet -e '.[bench]')
	$(BIN)/python -m benchmarks $(if $(PEER_ROOT),--peer-root $(PEER_ROOT))

targets: $(VENV)/installed-targets  ## compile all upsamplers for a TPU, without one; the table of docs/targets.md
	$(BIN)/python -m benchmarks --target v5e --workloads segmenter --dtypes bfloat16 --json docs/targets_v5e.json
	$(BIN)/python -m benchmarks --markdown docs/targets_v5e.json

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
