# `make quickstart` and `make test` set up what they need in .venv (or in VENV, if you have one already).
PYTHON ?= python3
VENV ?= .venv
# One environment per set of dependencies: a changed setup.py builds a new one beside the old mark.
STAMP := $(VENV)/.ltdd-$(shell sha256sum setup.py | cut -c1-12)
PYTEST := $(VENV)/bin/python -m pytest

.PHONY: quickstart check test test-faults lint setup

setup: $(STAMP)

$(STAMP):
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -qq --upgrade pip setuptools wheel
	@echo "installing torch and the rest (7 GB, some minutes) …"
	$(VENV)/bin/python -m pip install -qq --editable '.[scale,dev]'
	touch $@

quickstart: setup
	$(VENV)/bin/ltdd-scale run configs/quickstart.yaml

# Format, lint, types, the floors of the house.
lint: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ty check --python $(VENV) -q
	$(VENV)/bin/lint-imports --no-cache

# What a developer runs before each commit: some minutes.
check: lint
	$(PYTEST) -q -m "not slow"

# All tests, SLURM's included: about half an hour on two cores.
test: lint
	$(VENV)/bin/python tools/run_tests.py

# The whole fault-injection suite: some tens of minutes. CI runs a shorter one.
test-faults: setup
	LTDD_FAULTS=$(or $(FAULTS),200) LTDD_FAULTS_REPORT=$(CURDIR)/faults.tmp $(PYTEST) -s tests/faults
	{ echo "# Fault injection"; echo; date -u "+\`make test-faults\`, %Y-%m-%d."; echo; cat faults.tmp; } > benchmarks/faults.md
	rm faults.tmp
