# Two commands matter: `make quickstart` and `make test`. Each sets up .venv by itself.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-unit test-slow demo gpu lint setup docs clean

quickstart: setup
	@$(BIN)/oapl train recipes/quickstart.toml

test: setup
	@$(BIN)/python -m pytest -m "not slow and not gpu" $(ARGS)

test-unit: setup
	@$(BIN)/python -m pytest tests/unit -m "not slow and not gpu and not live" $(ARGS)

test-slow: setup
	@$(BIN)/python -m pytest tests -m "slow or gpu" --proofs=proofs.json $(ARGS)

demo: setup
	@$(BIN)/python -m experiments.demo

gpu: setup
	@PYTHONPATH=kernels:. $(BIN)/python -P benchmarks/gpu_check.py $(ARGS)

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

docs: setup
	@PYTHONPATH=kernels:. $(BIN)/python -m benchmarks docs

setup:
	@command -v $(PYTHON) >/dev/null || { echo "setup: no $(PYTHON) on this machine: install Python 3.11 or newer, or make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) .ci/bootstrap.py

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
