# Every target sets up what it needs. Nothing is assumed but Python >= 3.11 with pip and venv.
#
#   make demo       train a QP layer on mini-Sudoku puzzles, draw what it learned
#   make test       all tests but the slow ones, with the coverage of diffopt/ (at least 95 %)
#   make slow       the slow tests
#   make mutations  plant faults in the core one at a time; each must be caught by a test
#   make accuracy   print the worst errors of x and of all gradients against an exact reference
#   make lint       format, lint and types
#   make coverage   make test, then the lines that the measurement leaves out
#   make docs       build the documentation site into site/
#   make clean      remove what these targets made, .venv included

PYTHON ?= python3
JOBS ?= 2
DEMO_OPTIONS ?=

VENV := .venv
BIN := $(VENV)/bin

# An unpinned torch would fetch gigabytes. (As a variable, the pins reach pip's own build environments too.)
PIP_INSTALL := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install -qq --disable-pip-version-check

# Tests run in $(JOBS) processes, so each of them keeps to one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

.DEFAULT_GOAL := help
.PHONY: help demo test slow mutations accuracy lint format coverage docs clean
.NOTPARALLEL:

help:
	@sed -n 's/^#   //p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "diffopt needs Python >= 3.11, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
			"Name another one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp for each extra: .venv/installed-test is newer than what it was installed from.
$(VENV)/installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing diffopt with the extra '$*' into $(VENV) (a minute or so) ..."
	@$(PIP_INSTALL) --editable '.[$*]'
	@touch $@

# Waiting threads sleep instead of spinning: spinning halves the speed where another process wants the cores.
demo: $(VENV)/installed-examples
	OMP_WAIT_POLICY=passive $(BIN)/python examples/sudoku.py --output output $(DEMO_OPTIONS)

test: $(VENV)/installed-test
	$(PYTEST) -m "not slow" --cov --cov-report=term

slow: $(VENV)/installed-test
	$(PYTEST) -m slow

mutations: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutations.py

accuracy: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python tests/accuracy.py

coverage: test
	@echo "Lines that need a GPU and are not measured:"
	@grep -rn "pragma: cuda" diffopt --include="*.py" || echo "  none"

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/installed-docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site output *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage
