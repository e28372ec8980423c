# Everything runs from $(VENV), which the first target that needs it builds from pyproject.toml.
#   make demo                       a Linen model trained, then carried on in NNX
#   make test                       the suite (make test ARGS="-k renames" for a part of it)
#   make check                      what has to hold before a commit: lint, types, layers, test
#   make test PYTHON=python3.13 VENV=.venv-3.13
#   make floors                     the suite with the lowest version of each dependency, in .venv-floors
#   make newest PYTHON=python3.14   the suite with the newest version of each, in .venv-newest
#   make docs                       the documentation as a site, in site/

VENV ?= .venv
# The first interpreter in the supported range; a name given by the user is taken as it is.
SUPPORTED := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
ifndef PYTHON
PYTHON := $(shell for name in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$name -c '$(SUPPORTED)' 2>/dev/null && echo $$name && break; done)
endif
# The floors are older than the newest Pythons.
LOWEST = $(shell for name in python3.11 python3.12 python3.13 $(PYTHON); do \
	$$name -c '$(SUPPORTED)' 2>/dev/null && echo $$name && break; done)
INSTALL := -m pip install --quiet --disable-pip-version-check
RUN := $(VENV)/bin/python
# A folder's tests stay on one worker, so that what they set up and compile once is done once; tests/conftest.py
# puts the slowest files first. One worker more than two processors: many tests wait for a process that they started.
WORKERS ?= 3
ARGS ?=
TESTS := -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test floors newest docs lint types layers format check environment clean

demo: environment
	@$(RUN) -m orbax_nnx_handler demo

test: environment
	@$(RUN) $(TESTS) $(ARGS)

floors: .venv-floors/.installed
	@.venv-floors/bin/python $(TESTS) $(ARGS)

newest: .venv-newest/.installed
	@.venv-newest/bin/python $(TESTS) $(ARGS)

docs: .venv-docs/.installed
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet --strict
	@echo "site/index.html"

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
	@$(RUN) $(INSTALL) --editable ".[dev]"
	@touch $@

$(RUN):
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer (with venv and pip) found; pass PYTHON=…" >&2; exit 1; }
	@$(PYTHON) -c '$(SUPPORTED)' || { echo "$(PYTHON) is no Python 3.11 or newer with venv and pip" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

.venv-floors/.installed: pyproject.toml .ci/floors.py
	@echo "Installing the lowest version of each dependency into .venv-floors ($(LOWEST))"
	@rm -rf .venv-floors && $(LOWEST) -m venv .venv-floors
	@.venv-floors/bin/python .ci/floors.py >.venv-floors/constraints.txt
	@.venv-floors/bin/python $(INSTALL) --constraint .venv-floors/constraints.txt --editable ".[dev]"
	@touch $@

.venv-newest/.installed: pyproject.toml
	@echo "Installing the newest version of each dependency into .venv-newest ($(PYTHON))"
	@rm -rf .venv-newest && $(PYTHON) -m venv .venv-newest
	@.venv-newest/bin/python $(INSTALL) --upgrade --upgrade-strategy eager --editable ".[dev]"
	@touch $@

# Not the project itself: the pages are written by the suite, and the site needs none of its dependencies.
.venv-docs/.installed: pyproject.toml | $(RUN)
	@echo "Installing what builds the site into .venv-docs"
	@rm -rf .venv-docs && $(RUN) -m venv .venv-docs
	@.venv-docs/bin/python $(INSTALL) "mkdocs>=1.6,<2" "mkdocs-material>=9.5"
	@touch $@

clean:
	rm -rf $(VENV) .venv-floors .venv-newest .venv-docs site build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
