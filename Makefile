# `make quickstart` and `make test` set up what they need in .venv (or in VENV, if you have one already).
PYTHON ?= python3
VENV ?= .venv
# One environment per set of dependencies: a changed setup.py builds a new one beside the old mark.
STAMP := $(VENV)/.ltdd-$(shell sha256sum setup.py | cut -c1-12)

.PHONY: quickstart test test-quick test-faults lint setup

setup: $(STAMP)

$(STAMP):
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -qq --upgrade pip setuptools wheel
	@echo "installing torch and the rest (5 GB, some minutes) …"
	$(VENV)/bin/python -m pip install -qq --editable '.[scale,dev]'
	touch $@

quickstart: setup
	$(VENV)/bin/ltdd-scale run configs/quickstart.yaml

# SLURM's tests wait most of the time: they run beside the others, and what they say is shown after them.
test: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest tests/slurm >slurm-tests.tmp 2>&1 & slurm=$$!; trap "kill $$slurm" INT TERM; \
	$(VENV)/bin/python -m pytest --ignore=tests/slurm; others=$$?; \
	wait $$slurm; slurm=$$?; cat slurm-tests.tmp; rm slurm-tests.tmp; \
	exit $$((others + slurm))

test-quick: setup
	$(VENV)/bin/python -m pytest -m "not slow"

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# The whole fault-injection suite: some tens of minutes. CI runs a shorter one.
test-faults: setup
	LTDD_FAULTS=$(or $(FAULTS),200) LTDD_FAULTS_REPORT=$(CURDIR)/faults.tmp $(VENV)/bin/python -m pytest -s tests/faults
	{ echo "# Fault injection"; echo; date -u "+\`make test-faults\`, %Y-%m-%d."; echo; cat faults.tmp; } > benchmarks/faults.md
	rm faults.tmp
