# make demo   set up a virtual environment, install, run every stage on the bundled graph
# make test   set up if needed, run the checks and the test suite
# make slow   the tests that take minutes
# Python 3.11 to 3.13; with another than the first one found: make demo PYTHON=/path/to/python3.12
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: demo test slow check setup setup-dev clean
setup: .venv/.installed
setup-dev: .venv/.installed-dev

.venv/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "error: $(PYTHON) is not Python 3.11, 3.12 or 3.13; run: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	@touch $@

.venv/.installed-dev: .venv/.installed requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	@touch $@

demo: setup
	$(PY) demo_complete.py

check: setup-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# two processes, a file of tests each; one thread each, since they share the cores
test: check
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile

slow: setup-dev
	$(PY) -m pytest -q -m slow

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache demo_output
