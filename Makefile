# `make test` and `make demo` need nothing but a Python >= 3.10 and a package index; everything else is set up in .venv.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/ready

.PHONY: setup test test-slow lint demo clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

test: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

test-slow: $(READY)
	$(VENV)/bin/python -m pytest -q -m slow

demo: $(READY)
	OMP_WAIT_POLICY=passive PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python examples/demo.py

clean:
	rm -rf $(VENV) demo-out
