# Everything runs from $(VENV), which the first target that needs it builds from pyproject.toml.
#   make demo                       a Linen model trained, then carried on in NNX
#   make test                       the suite (make test ARGS="-k renames" for a part of it)
#   make check                      what has to hold before a commit: lint, types, layers, test
#   make test PYTHON=python3.13 VENV=.venv-3.13

VENV ?= .venv
# The first interpreter in the supported range; a name given by the user is taken as it is.
SUPPORTED := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
ifndef PYTHON
PYTHON := $(shell for name in python3 python3.13 python3.12 python3.11; do \
	$$name -c '$(SUPPORTED)' 2>/dev/null && echo $$name && break; done)
endif
RUN := $(VENV)/bin/python
# A file's tests stay on one worker, so that what they set up once is set up once; tests/conftest.py puts the
# slowest files first.
WORKERS ?= 2
ARGS ?=

.PHONY: demo test lint types layers format check environment clean

demo: environment
	@$(RUN) -m orbax_nnx_handler.demo

test: environment
	@$(RUN) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: environment
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

types: environment
	@$(VENV)/bin/pyright --pythonpath $(RUN)

layers: environment
	@$(VENV)/bin/lint-imports --no-logo

format: environment
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

check: lint types layers test

environment: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml | $(RUN)
	@echo "Installing the project and its tools into $(VENV)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

$(RUN):
	@test -n "$(PYTHON)" || { echo "No Python 3.11 to 3.13 (with venv and pip) found; pass PYTHON=…" >&2; exit 1; }
	@$(PYTHON) -c '$(SUPPORTED)' || { echo "$(PYTHON) is no Python 3.11 to 3.13 with venv and pip" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
