VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3

.PHONY: quickstart test check bench bench-engine bench-trl bench-gpu clean

quickstart: $(VENV)/ready
	$(BIN)/axpo quickstart

test: check
	$(BIN)/pytest

check: $(VENV)/ready
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# Each benchmark writes benchmarks/results/NAME.json; nothing else should run beside it.
bench: $(VENV)/ready
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/resampling_cost.py
	$(BIN)/python benchmarks/python_tool.py
	$(BIN)/python benchmarks/engine.py

bench-engine: $(VENV)/ready .venv-vllm/ready
	$(BIN)/python benchmarks/engine.py

bench-trl: .venv-trl/ready
	.venv-trl/bin/python benchmarks/step_vs_trl.py

bench-gpu: $(VENV)/ready
	$(BIN)/python benchmarks/gpu_step.py

.venv-trl/ready: pyproject.toml constraints.txt benchmarks/requirements-trl.txt
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/pip install --quiet --constraint constraints.txt --editable . --requirement benchmarks/requirements-trl.txt
	.venv-trl/bin/pip install --quiet --no-deps torchvision==0.28.0
	touch $@

# vLLM also brings torchaudio, torchcodec and torchvision, built for CUDA: without it they break the import of
# transformers, and text needs none of them.
.venv-vllm/ready: benchmarks/requirements-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --requirement benchmarks/requirements-vllm.txt
	.venv-vllm/bin/pip uninstall --quiet --yes torchaudio torchcodec torchvision
	touch $@

clean:
	rm -rf $(VENV) .venv-trl .venv-vllm
