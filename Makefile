# Everything happens in a virtual environment inside the checkout: `make demo`, `make test`.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
TESTABLE := .venv/.testable

.PHONY: demo test reproduce bench docs lint clean

demo: $(INSTALLED)
	$(BIN)/tokenflex quickstart --output_dir outputs/demo

test: $(TESTABLE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

reproduce: $(INSTALLED)
	$(BIN)/tokenflex reproduce --output_dir outputs/reproduce

bench: $(INSTALLED)
	$(BIN)/python benchmarks/peers.py --output_dir outputs/bench

docs: $(TESTABLE)
	$(BIN)/mkdocs build

lint: $(TESTABLE)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable .
	touch $(INSTALLED)

$(TESTABLE): $(INSTALLED)
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[docs,test]"
	touch $(TESTABLE)

clean:
	rm -rf .venv outputs build dist *.egg-info
