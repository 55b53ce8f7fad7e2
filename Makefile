VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3

.PHONY: quickstart test test-vllm check bench bench-engine bench-trl bench-gpu clean

quickstart: $(VENV)/ready
	$(BIN)/axpo quickstart

# Two at a time, each with a core of its own; a file's tests share what they prepare.
test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile

# The engines' contract with vLLM, which needs 4 GB of packages and an environment of its own.
PART := vllm or servers
test-vllm: .venv-vllm/ready
	.venv-vllm/bin/python -c "import vllm"  # without it all tests would be skipped
	TORCHDYNAMO_DISABLE=1 .venv-vllm/bin/pytest tests/engines -k "$(PART)"

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

# vLLM on the CPU, with axpo. It brings torchaudio, torchcodec and torchvision, built for CUDA: transformers cannot be
# imported with the first two, and images need torchvision, to which torchvision_shim.py gives what it lacks.
.venv-vllm/ready: pyproject.toml benchmarks/requirements-vllm.txt benchmarks/torchvision_shim.py
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --requirement benchmarks/requirements-vllm.txt --editable ".[lora]"
	.venv-vllm/bin/pip uninstall --quiet --yes torchaudio torchcodec
	cp benchmarks/torchvision_shim.py $$(.venv-vllm/bin/python -c "import site; print(site.getsitepackages()[0])")
	echo "import torchvision_shim" > $$(.venv-vllm/bin/python -c "import site; print(site.getsitepackages()[0])")/torchvision_shim.pth
	touch $@

clean:
	rm -rf $(VENV) .venv-trl .venv-vllm
