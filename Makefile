# `make demo` and `make test` set up a virtual environment by themselves; both are quick when it is already there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Processes that share the tests, whole files each. More need more memory: each has its own Ray and MLflow.
JOBS ?= 2

.PHONY: setup demo test lint bench acceptance recipes clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,onnx]'
	touch $@

demo: setup
	$(BIN)/nearfar demo

test: setup
	$(BIN)/python -m pytest -m 'not acceptance and not benchmark' -n $(JOBS) --dist loadfile

acceptance: setup
	$(BIN)/python -m pytest -m acceptance -s

bench: setup
	$(BIN)/python -m pytest tests/benchmarks -m benchmark -s

# Every recipe, about an hour on two quiet cores; stopped in the middle, the same command goes on.
recipes: setup
	$(BIN)/python -m tests.recipes demo

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info
