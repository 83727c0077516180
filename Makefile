# Two commands do all the set-up: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread a test process: two test processes on two cores get in each other's way otherwise.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

.PHONY: demo test test-faults test-fuzz test-slurm test-gpu test-interop check lint format test-wheel demo-base build clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and alone: with the pinned one in place nothing later pulls in another.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/llamatune demo --output demo-output

test: $(VENV)/.installed-dev
	$(PYTEST)

# The long sweeps: thousands of faults, kills and damaged files.
test-faults: $(VENV)/.installed-dev
	$(PYTEST) -m slow

# Damaged files: 3,000 mutations of each file that a verb reads, each read by one of its verbs in turn. FUZZ takes options,
# such as FUZZ=--every-verb, FUZZ="--seconds 600" or FUZZ="--only 'rows/*' --seed 7".
test-fuzz: $(VENV)/.installed-dev
	$(BIN)/python tests/fuzz/fuzz.py $(FUZZ)

# Jobs on a Slurm of two nodes, which the tests install (as root, by apt-get) and start in network namespaces. Skipped,
# with the reason, where that cannot be done.
test-slurm: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/slurm -m slurm -rs

# On a GPU, a few minutes; skipped, with the reason, where CUDA finds none. The kernels' own tests run there, too.
test-gpu: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/gpu tests/model/kernels -m "not slow" -rs

# Other programs are asked about what is written: two generations of transformers and PEFT, mlx-lm, llama.cpp, tiktoken,
# with real tokenizers and a real model. The first time fetches and builds them (about 2 GB, up to an hour) into a cache
# outside the repository (LLAMATUNE_INTEROP). What cannot be fetched is skipped, with the reason.
test-interop: $(VENV)/.installed-dev
	$(BIN)/python tests/interop/fetch.py
	$(BIN)/python -m pytest tests/interop -m interop -rs

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The wheel in an environment of its own, with nothing else in it, runs the demo.
test-wheel: $(VENV)/.installed-dev
	$(BIN)/python tests/packaging/try_wheel.py

# Trains the tiny base of the demo anew (about half an hour on two cores).
demo-base: $(VENV)/.installed
	$(BIN)/python make_demo/make_base.py --output demo-base

build: $(VENV)/.installed-dev
	$(BIN)/python -m build

clean:
	rm -rf build dist demo-output .pytest_cache .mypy_cache .ruff_cache
