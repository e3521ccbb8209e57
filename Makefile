# Everything that a person or CI runs. `make demo` and `make test` create what they need.

PYTHON ?= python3
VENV ?= .venv
# What is installed where there is no GPU, before anything asks for torch. Where pip finds no CPU build of that version
# (on Linux, PyPI has those with CUDA), name one:
#   make demo CPU_TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
CPU_TORCH ?= torch==2.13.0
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
# A process for each core, and so one thread for each process. Each takes up to 2 GB.
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 8
CHECKPOINT_TESTS = tests/test_golden.py tests/test_auto_classes.py tests/test_pipelines.py
SOURCES = panfoma_cli panfoma_hf scripts tests

.PHONY: demo test test-all test-transformers lint format bench clean

demo: $(VENV)/.demo  ## Fine-tune on real pancreas cells and name unseen ones; writes runs/demo/
	$(VENV)/bin/panfoma demo --out runs/demo

test: $(VENV)/.dev  ## The tests that fit into minutes
	$(PYTEST)

test-all: $(VENV)/.dev  ## All tests, the slow ones too
	$(PYTEST) -m "slow or not slow"

# What each needs beside what is installed anyway, which is for the newest.
LOWEST_TRANSFORMERS = transformers==5.17.0 "huggingface-hub<2" httpx httpcore h11
NEWEST_TRANSFORMERS = --upgrade transformers
test-transformers: $(VENV)/.dev  ## What a checkpoint gives, on the lowest and the newest Transformers that are supported
	rm -rf build/lowest build/newest
	$(PIP) --no-deps --target build/lowest $(LOWEST_TRANSFORMERS)
	$(PIP) --no-deps --target build/newest $(NEWEST_TRANSFORMERS)
	for version in lowest newest; do \
		PYTHONPATH=build/$$version $(VENV)/bin/python -c "import transformers; print(transformers.__version__)"; \
		PYTHONPATH=build/$$version $(VENV)/bin/python -m pytest $(CHECKPOINT_TESTS) || exit 1; done

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
