# make setup | demo | check | test | lint | docs | bench | gpu; each sets itself up and does nothing twice
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest
SWEEP := hydra/launcher=joblib hydra.sweep.dir=runs/demo
# the programs that tests start would compile this package anew each time
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo check test lint docs bench gpu clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("fedpers needs Python 3.11 or newer, this is %d.%d" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@echo "installing into $(VENV): 2.4 GB, some two minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

# the launcher makes as many runs side by side as there are cores
demo: setup
	@rm -rf runs/demo
	$(BIN)/fedpers +experiment=demo $(SWEEP)/1_label_groups
	$(BIN)/fedpers +experiment=pfedpg $(SWEEP)/2_prompts rounds=3 evaluate_every=1 strategy=local,fedavg,fedvpt,pfedpg seed=0,1
	$(BIN)/fedpers +experiment=fedjets $(SWEEP)/3_experts rounds=50 strategy=local,fedavg,pretrained,fedjets seed=0,1
	$(BIN)/fedpers +experiment=ranking $(SWEEP)/4_ratings rounds=8 strategy=local,fedavg,fedmf,fedrap,no_learning seed=0,1
	@echo
	$(BIN)/fedpers compare runs/demo
	$(BIN)/fedpers report runs/demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict fedpers

check: lint
	$(PYTEST) --numprocesses=2 --dist=worksteal -m "not slow"

# the tests of a file, which may share a Ray cluster, stay in one process; one process more than cores, since some wait
test: lint
	$(PYTEST) --numprocesses=3 --dist=loadfile --no-loadscope-reorder

# README, docs/ and experiments/ as pages in build/docs; a warning is an error
docs: setup
	$(BIN)/python -m sphinx -W --keep-going -q -c docs . build/docs
	@echo build/docs/docs/index.html

bench: setup
	$(BIN)/python -m benchmarks.local_grid
	$(BIN)/python -m benchmarks.ray_grid
	$(BIN)/python -m benchmarks.cohort
	$(BIN)/python -m benchmarks.peers

# on a machine with a GPU, at most 10 minutes: traces, cohorts of any size, checkpoints, and seconds of a round
gpu: setup
	timeout 200 $(BIN)/python -m tests.reference --device cuda
	$(BIN)/python -c 'from fedpers.strategies import STRATEGIES; print(*STRATEGIES)' | \
		xargs -n 6 -P 9 timeout 240 $(BIN)/python -m tests.equivalence --device cuda cohort
	timeout 60 $(PYTEST) --numprocesses=6 tests/test_checkpoint.py -k every_method --device cuda
	timeout 60 $(BIN)/python -m benchmarks.peers --device cuda --workers 1 --rounds 5 --turns 2
	timeout 60 $(BIN)/python -m benchmarks.peers --device cuda --workers 1 --rounds 5 --turns 2 --problem cnn

clean:
	rm -rf $(VENV) runs multirun build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
