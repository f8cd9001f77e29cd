# make demo, make test, make test-slow, make lint, make bench, make faults, make reproduce. Each makes .venv and installs what is
# missing.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test test-slow lint bench faults reproduce clean

# Two minutes or so: PyTorch comes with its CUDA libraries. The versions are those of requirements.lock.
$(INSTALLED): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'error: $(PYTHON) is older than 3.11; call make PYTHON=/path/to/python3.11'; exit 1; }
	@echo 'Installing into .venv (once; some minutes)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable '.[dev]'
	@touch $@

# Train on digits, measure, draw: about ten minutes. One thread, because a network for 8x8 images gains
# half as much again from a second one on a quiet machine, and on a busy one loses many times over.
demo: export OMP_NUM_THREADS ?= 1
demo: $(INSTALLED)
	$(BIN)/python main.py fit --config configs/digits/ddpm.yaml
	$(BIN)/python main.py test --config configs/digits/ddpm.yaml --ckpt_path last
	$(BIN)/python main.py predict --config configs/digits/ddpm.yaml --ckpt_path last

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m 'not slow'

# The long ones, before a release.
test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m slow

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Speed and memory, about ten minutes; it can be stopped and called again. Of another state: rm -r runs/speed first.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/speed.py

# Runs killed and resumed: half an hour or more; it can be stopped and called again.
faults: export OMP_NUM_THREADS ?= 1
faults: $(INSTALLED)
	$(BIN)/python benchmarks/faults.py

# Every claim of the report, measured: by count three hours for digits on two cores; it can be stopped and called again.
# Options: make reproduce BUDGET=3h MORE='--seeds 0 --publish'
# On photographs, in as many calls as it takes: make reproduce DATA=cifar10 ROOT=folder BUDGET=3h
DATA ?= digits
reproduce: $(INSTALLED)
	$(BIN)/python benchmarks/reproduce.py $(DATA) $(if $(ROOT),--root $(ROOT)) $(if $(BUDGET),--budget $(BUDGET)) $(MORE)

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
