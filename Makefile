# Set-up, training, tests and measurements. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS := .venv-peers
OLDEST := .venv-oldest
NEWEST := .venv-newest
MUTATION := .venv-mutation

# Extra arguments for `make train`, for example ARGS="--trainer.max_epochs 20"
ARGS ?=
# Where `make paper` finds MNIST
DATA ?= sample
# Which file of lightning_sfn/newton `make mutation` changes, and what its tests are called
FILE ?= trust_region
TESTS ?= test_$(FILE).py
# What `make bench` runs, in this order. Not among them: `make bench-peers`, `make paper`, `lightning-sfn reproduce`, and
# what needs words of its own: benchmarks/sgd_equal_time.py (a finished fig3) and the races of docs/method.md (race_probes, race_secants).
BENCHMARKS ?= benchmarks/stall_search.py benchmarks/plateau_spectrum.py benchmarks/spectrum_accuracy.py benchmarks/autoencoder_escape.py benchmarks/sharded_basis.py benchmarks/rounded_products.py benchmarks/engine.py benchmarks/race.py benchmarks/tables.py

.PHONY: help setup train test lint coverage oldest newest docs bench clean paper bench-peers mutation

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(INSTALLED) ## create .venv and install everything, pinned; redone only when the pins change

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "$(PYTHON) was not found: name a Python of version 3.10 or newer, as in make PYTHON=python3.12 $(MAKECMDGOALS)." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is older than Python 3.10: name a newer one, as in make PYTHON=python3.12 $(MAKECMDGOALS)." >&2; exit 1; }
	@echo "[setup] creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "[setup] installing the pinned packages (minutes on the first run, torch is large)"
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e ".[all,test]"
	@touch $@
	@echo "[setup] ready"

train: $(INSTALLED) ## train the autoencoder recipe; more arguments in ARGS="..."
	@HF_HUB_OFFLINE=1 $(BIN)/lightning-sfn fit -c recipes/autoencoder.yaml $(ARGS)

lint: $(INSTALLED) ## check style and types
	@echo "[lint] ruff"
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet || { $(BIN)/ruff format --check; exit 1; }
	@echo "[lint] mypy"
	@$(BIN)/mypy

test: lint ## check style and types, then run the tests
	@echo "[test] pytest"
	@$(BIN)/python -m pytest -q -n 2

coverage: $(INSTALLED) ## run the tests and show which lines and branches of the package they miss; under 95 % is an error
	@$(BIN)/python -m pytest -q -n 2 --cov --cov-report=term

$(OLDEST)/.installed: pyproject.toml
	@echo "[oldest] creating $(OLDEST) with every lower bound of pyproject.toml (minutes on the first run)"
	@$(PYTHON) -m venv --clear $(OLDEST)
	@grep -oE '"[a-z-]+(\[[a-z]+\])?>=[0-9.]+' pyproject.toml | sed -E 's/"//; s/\[.*\]//; s/>=/==/' > $(OLDEST)/bounds.txt
	@$(OLDEST)/bin/python -m pip install --quiet --quiet --disable-pip-version-check -c $(OLDEST)/bounds.txt -e ".[all,test]"
	@touch $@

oldest: $(OLDEST)/.installed ## run the tests with the oldest supported torch and pytorch-lightning
	@echo "[oldest] pytest"
	@$(OLDEST)/bin/python -m pytest -q -n 2

$(NEWEST)/.installed: pyproject.toml
	@echo "[newest] creating $(NEWEST) without pins (minutes on the first run)"
	@$(PYTHON) -m venv --clear $(NEWEST)
	@$(NEWEST)/bin/python -m pip install --quiet --quiet --disable-pip-version-check -e ".[all,test]"
	@touch $@

newest: $(NEWEST)/.installed ## run the tests with the newest supported torch and pytorch-lightning; `make clean` forgets which
	@echo "[newest] pytest"
	@$(NEWEST)/bin/python -m pytest -q -n 2

$(MUTATION)/.installed: pyproject.toml constraints.txt
	@echo "[mutation] creating $(MUTATION) (minutes on the first run)"
	@$(PYTHON) -m venv $(MUTATION)
	@$(MUTATION)/bin/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e ".[mutation]"
	@touch $@

mutation: $(MUTATION)/.installed ## change one file of newton in every small way, and list the changes that no test notices; FILE=name
	@rm -f mutants/mutmut-stats.json
	@OMP_NUM_THREADS=1 PYTEST_ADDOPTS="-k '$(TESTS)'" $(MUTATION)/bin/mutmut run --max-children 1 "lightning_sfn.newton.$(FILE).*"
	@$(MUTATION)/bin/mutmut results --all true | awk '/newton\.$(FILE)\./ { count[$$NF]++; if ($$NF != "killed") print } END { for (state in count) print count[state], state }'

docs: $(INSTALLED) ## build the documentation into build/site; warnings are errors
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

paper: $(INSTALLED) ## the paper's autoencoder at its own size, piece by piece; DATA=folder of MNIST parquet files (wants a GPU)
	@status=3; while [ $$status -eq 3 ]; do status=0; $(BIN)/python benchmarks/paper_autoencoder.py run --data $(DATA) || status=$$?; done; exit $$status
	@$(BIN)/python benchmarks/paper_autoencoder.py roofline --data $(DATA)
	@$(BIN)/python benchmarks/paper_autoencoder.py report --output benchmarks/results/paper_autoencoder.json

bench: $(INSTALLED) ## run the benchmarks listed in BENCHMARKS
	@for script in $(BENCHMARKS); do \
	    words=(); [[ $$script != */autoencoder_escape.py ]] || words=(--plot docs/escape.png); \
	    echo "[bench] $$script $${words[*]-}"; $(BIN)/python "$$script" $${words[@]+"$${words[@]}"}; \
	done

$(PEERS)/.installed: pyproject.toml constraints.txt benchmarks/peers.txt
	@echo "[bench-peers] creating $(PEERS) and installing what is compared (minutes on the first run)"
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e ".[data]" scipy
	@$(PEERS)/bin/python -m pip install --quiet --quiet --disable-pip-version-check --no-deps -r benchmarks/peers.txt
	@touch $@

bench-peers: $(PEERS)/.installed ## compare products and spectra with other libraries, in an environment of their own
	@echo "[bench-peers] benchmarks/peers.py"
	@$(PEERS)/bin/python benchmarks/peers.py

clean: ## remove .venv, caches and what runs left behind
	@rm -rf $(VENV) $(PEERS) $(OLDEST) $(NEWEST) $(MUTATION) mutants .coverage .coverage.* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis runs lightning_logs
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
