# make quickstart   train everything on the synthetic world and write the report (minutes)
# make test         all tests             make check   lint, types and the quick tests
# make bench        benchmarks            make lock    pin the newest versions that setup.py allows
# Each makes .venv first, if it is not there or setup.py or the lock changed.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WORKERS ?= auto
PYTEST := $(BIN)/python -m pytest --numprocesses=$(WORKERS) --maxprocesses=4 --dist=loadfile
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3.11 python3; do \
  $$python -c '$(NEW_ENOUGH)' 2>/dev/null && { echo $$python; break; }; done)

.PHONY: install quickstart check lint types test bench lock clean

install: $(INSTALLED)

$(INSTALLED): setup.py requirements.lock
	@test -n "$(PYTHON)" || { echo "rmd-jax needs Python 3.11 or newer: apt-get install python3.11 python3.11-venv, or make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

quickstart: $(INSTALLED)
	$(BIN)/rmd run --gin_file=runs/quickstart.gin --run_dir=runs/quickstart

check: lint types
	$(PYTEST) -m "not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

test: $(INSTALLED)
	$(PYTEST)

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

# A fresh environment, so that nothing that was installed by hand slips into the lock.
lock:
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --upgrade pip setuptools wheel
	build/lock/bin/python -m pip install --quiet ".[dev]"
	build/lock/bin/python -m pip freeze --all --exclude pip --exclude rmd-jax > requirements.lock
	rm -rf build

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
