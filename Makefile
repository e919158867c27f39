# Everything runs in a virtual environment that the first target asked for creates and later ones reuse.
# `make help` lists the targets. PYTHON (3.11 or newer) and VENV can be set: make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
PROBLEM ?= martens_grosse

BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.ready-docs
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv compare report benchmarks test test-slow lint format docs dist constraints clean

help: ## list the targets (the default)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(READY) ## create the virtual environment and install the package with all that the tests need

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than 3.11: name a newer one, as in make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(READY): pyproject.toml constraints.txt requirements-peers.txt | $(BIN)/python
	$(PIP_INSTALL) -c constraints.txt -e '.[data,dev]'
	$(PIP_INSTALL) --no-deps -r requirements-peers.txt
	@touch $@

# Without what the tests need: the extra `docs` is to be enough.
$(DOCS_READY): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -c constraints.txt -e '.[docs]'
	@touch $@

compare: $(READY) ## the main job: compare all approximations with the exact Fisher of a real net
	@mkdir -p runs
	$(BIN)/fisher-lab compare --problem $(PROBLEM) --output runs/$(PROBLEM).json

report: $(READY) ## the same as one self-contained HTML page
	@mkdir -p runs
	$(BIN)/fisher-lab report --problem $(PROBLEM) --output runs/$(PROBLEM).html

benchmarks: $(READY) ## measure time and memory beside other libraries and write docs/benchmarks (half an hour)
	$(BIN)/python -m analysis.benchmarks.run

test: $(READY) ## run all tests but the slow ones (PYTEST_ARGS="-k name" narrows it)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal -m "not slow" $(PYTEST_ARGS)

test-slow: $(READY) ## run the slow tests
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal -m slow $(PYTEST_ARGS) || { code=$$?; test $$code -eq 5 || exit $$code; } # 5: there are none

lint: $(READY) ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY) ## put the code into the common format
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

docs: $(DOCS_READY) ## build the documentation into docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

dist: $(READY) ## build the wheel and the source distribution into dist/
	rm -rf dist
	$(BIN)/python -m build

# In a fresh environment, so that nothing installed by hand gets in. Only torch is kept at the version it is tested with;
# PyPI has no local versions such as +cpu, so they are cut off. To move torch, edit its line in constraints.txt and run this.
constraints: ## pin anew all dependencies but torch in constraints.txt
	@set -e; fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; \
	grep '^torch==' constraints.txt > "$$fresh/torch.txt"; \
	$(PYTHON) -m venv "$$fresh/venv"; \
	echo "installing the newest versions of everything beside $$(cat "$$fresh/torch.txt")"; \
	"$$fresh/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile \
		-c "$$fresh/torch.txt" -e '.[data,dev,docs]'; \
	"$$fresh/venv/bin/python" -m pip freeze --exclude-editable > "$$fresh/frozen.txt"; \
	sed 's/+[^ ]*$$//' "$$fresh/frozen.txt" > constraints.txt; \
	echo "constraints.txt: $$(wc -l < constraints.txt) packages"

clean: ## remove the virtual environment, caches and build products (runs/ is kept)
	rm -rf $(VENV) build dist docs/_build docs/auto_examples docs/generated htmlcov .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
