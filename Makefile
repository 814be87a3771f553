# make demo   set up a virtual environment, install, run every stage on the bundled graph
# make test   set up if needed, run the checks and the test suite
# make slow   the tests that take minutes
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PY := .venv/bin/python

.PHONY: demo test slow check setup clean
setup: .venv/.installed

.venv/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "error: $(PYTHON) is not Python 3.11; run: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

demo: setup
	$(PY) demo_complete.py

check: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# two processes, a file of tests each; one thread each, since they share the cores
test: check
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile

slow: setup
	$(PY) -m pytest -q -m slow

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache demo_output
