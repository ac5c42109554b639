# Set-up, tests, demo and benchmarks. Every target sets up what it needs.
PYTHON ?= python3.11
VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PATH := $(BIN):$(PATH)
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo demo-ppo test test-slow lint types lock bench clean

setup: $(READY)

$(READY): requirements/cpu.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps -r requirements/cpu.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(READY)

demo: $(READY)
	$(BIN)/python -m jobs.run_recipe jobs/recipes/demo.yaml

demo-ppo: demo
	$(BIN)/python -m jobs.run_recipe jobs/recipes/demo_ppo.yaml

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

test: lint types
	$(BIN)/pytest -m "not slow and not api"

test-slow: $(READY)
	$(BIN)/pytest -m "slow and not api"

bench: $(READY)
	$(BIN)/python benchmarks/bleurt.py
	$(BIN)/python benchmarks/judging.py
	$(BIN)/python benchmarks/pairing.py
	$(BIN)/python benchmarks/ppo.py
	$(BIN)/python benchmarks/sampling.py
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/ray_data.py
	$(BIN)/python benchmarks/reward_training.py
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python benchmarks/translation.py

lock: $(READY)
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile requirements/cpu.in --override requirements/overrides.txt --python-version 3.11 \
		--index-strategy unsafe-best-match --no-annotate --no-header --upgrade --output-file requirements/cpu.lock

clean:
	rm -rf runs .mypy_cache .ruff_cache .pytest_cache
