VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3

.PHONY: quickstart test check clean

quickstart: $(VENV)/ready
	$(BIN)/axpo quickstart

test: check
	$(BIN)/pytest

check: $(VENV)/ready
	$(BIN)/ruff format --check src tests benchmarks benchmarks
	$(BIN)/ruff check src tests benchmarks benchmarks
	$(BIN)/mypy

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV)
