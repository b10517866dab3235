# The two commands of the README do all set-up: `make demo` and `make test`.
# Variables: PYTHON (3.11 or newer), SUBSET (items of the demo), PYTEST_ARGS.

# The first that runs: a pyenv shim may be there without its version. 3.11 first: the constraints were tested on it.
PYTHON ?= $(shell for p in python3.11 python3; do $$p -c '' 2>/dev/null && command -v $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MODEL := build/mini
PAGE := build/demo/index.html

.DEFAULT_GOAL := help
.PHONY: help demo test check retrieval clean

help: ## what there is to make
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/'

$(STAMP): setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "No python3 found; install Python 3.11 or newer (Debian: apt-get install python3 python3-venv)."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "Python's venv is missing; Debian: apt-get install python3-venv."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[train,eval,recommend,test]"
	touch $@

demo: $(STAMP) ## install, build mini, fetch data, search it, write build/demo/index.html (SUBSET=60 for less)
	@ls /var/lib/apt/lists/*Packages* >/dev/null 2>&1 || apt-get update -q || echo "apt's lists are empty and could not be updated; run 'apt-get update' as root."
	$(BIN)/sail build --preset mini --out $(MODEL)
	$(BIN)/sail demo --model $(MODEL) --out $(PAGE) $(if $(SUBSET),--subset $(SUBSET))

test: $(STAMP) ## install, run the whole test suite
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

check: $(STAMP) ## what CI runs: style, types, tests
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

retrieval: $(STAMP) ## the table of the README: mini beside the linear baseline on held-out names
	$(BIN)/python -m modeling_sail.evaluation.tuxpaint_retrieval --model $(MODEL) --work runs/mini

clean: ## remove what was built; the environment and the caches stay
	rm -rf build dist *.egg-info
