# `make test` and `make demo` need nothing but a Python >= 3.10 and a package index; everything else is set up in .venv.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/ready

.PHONY: setup test test-slow lint demo clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV), once. It takes some minutes, and 2 GB of disk, or several more where torch comes with CUDA."
	@echo "1 of 3: a virtual environment (seconds)"
	@$(PYTHON) -m venv $(VENV)
	@echo "2 of 3: torch, the largest download (minutes)"
	@$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch
	@echo "3 of 3: mergekit, transformers and what the tests need (minutes)"
	@$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@
	@echo "$(VENV) is ready."

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
