# Everything that a person or CI runs. `make demo` and `make test` create what they need.

PYTHON ?= python3
VENV ?= .venv
# What is installed where there is no GPU, before anything asks for torch. Where pip finds no CPU build of that version
# (on Linux, PyPI has those with CUDA), name one:
#   make demo CPU_TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
CPU_TORCH ?= torch==2.13.0
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
SOURCES = panfoma_cli panfoma_hf scripts tests

.PHONY: demo test test-all lint format bench clean

demo: $(VENV)/.demo  ## Fine-tune on real pancreas cells and name unseen ones; writes runs/demo/
	$(VENV)/bin/panfoma demo --out runs/demo

test: $(VENV)/.dev  ## The tests that fit into minutes
	$(VENV)/bin/python -m pytest

test-all: $(VENV)/.dev  ## All tests, the slow ones too
	$(VENV)/bin/python -m pytest -m "slow or not slow"

lint: $(VENV)/.dev  ## Style, as CI checks it
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES)

format: $(VENV)/.dev  ## Mend what the linter can mend
	$(VENV)/bin/ruff check --fix $(SOURCES)
	$(VENV)/bin/ruff format $(SOURCES)

bench: $(VENV)/.bench  ## Speed of the scan and of whole models on this machine, beside what else there is
	$(VENV)/bin/python scripts/benchmark_speed.py

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	if command -v nvidia-smi > /dev/null; then $(PIP) torch; else $(PIP) $(CPU_TORCH); fi
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --editable ".[demo]"
	touch $@

$(VENV)/.bench: $(VENV)/.torch pyproject.toml
	$(PIP) --editable ".[bench]"
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) --editable ".[dev]"
	touch $@ $(VENV)/.demo $(VENV)/.bench
