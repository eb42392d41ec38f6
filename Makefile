# Everything happens in a virtual environment inside the checkout: `make demo`, `make test`.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
TESTABLE := .venv/.testable
REAL := .matrix/real
# For `make matrix`: the tests to run, all if empty, and releases of transformers, each with what else differs there.
TESTS ?=
VERSIONS ?= 5.18.0,torch==2.9.1,torchao==0.16.0 5.19.0 5.20.2 5.21.1 5.22.2 5.23.0 5.24.0 5.24.0,torch==2.14.1

.PHONY: demo test matrix test-upstream test-vllm test-torchvision test-real real reproduce bench docs lint clean

demo: $(INSTALLED)
	$(BIN)/tokenflex quickstart --output_dir outputs/demo

test: $(TESTABLE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

matrix: $(TESTABLE)
	tests/matrix.sh "$(VERSIONS)" $(TESTS)

test-upstream: $(TESTABLE)
	tests/upstream/run.sh

test-vllm: $(TESTABLE)
	tests/engine/run.sh $(TESTS)

test-torchvision: $(TESTABLE)
	tests/torchvision.sh $(TESTS)

test-real: $(TESTABLE) $(REAL)/.downloaded
	PYTHONPATH=$(REAL) $(BIN)/python -m pytest -n 0 tests/real

real: $(TESTABLE) $(REAL)/.downloaded
	PATH="$(abspath $(BIN)):$$PATH" PYTHONPATH=$(abspath $(REAL)) examples/real_model.sh outputs/real

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

$(REAL)/.downloaded: tests/real/requirements.txt | $(INSTALLED)
	$(BIN)/python -m pip install --no-deps --upgrade --target $(REAL) -r tests/real/requirements.txt
	touch $(REAL)/.downloaded

clean:
	rm -rf .matrix .venv outputs build dist *.egg-info
