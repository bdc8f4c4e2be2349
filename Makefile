# make demo | make test | make checks | make bench       everything else follows from these
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
VENV ?= .venv
PY := $(VENV)/bin/python
RANKS ?= 2
TESTERS ?= 2
DEMO := runs/demo
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test checks bench clean

# All stages under ZeRO-3 on 2 ranks from generated data, then questions that training never saw.
demo: $(VENV)/installed
	deepspeed --num_accelerators $(RANKS) pipeline/train.py --ds ds_configs/zero3.json --out $(DEMO)
	OMP_NUM_THREADS=$(RANKS) $(PY) -m pipeline.evaluate --run $(DEMO) --batch 100 > /dev/null  # the summary has it all
	$(PY) -m pipeline.summary --run $(DEMO)

# TESTERS processes share the tests; each has up to four ranks at a time.
test: $(VENV)/installed
	$(PY) -m pytest -q -rs --durations=10 --numprocesses $(TESTERS) --dist worksteal tests

checks: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The virtual environment, made anew when what it is made from changes.
$(VENV)/installed: pyproject.toml setup.cfg constraints.txt install.sh
	./install.sh $(VENV)
	touch $@

# Ratios measured side by side in one run, on all cores.
bench: $(VENV)/installed
	OMP_NUM_THREADS=$$(nproc) $(PY) -m benchmarks.step_cost
	OMP_NUM_THREADS=$$(nproc) $(PY) -m benchmarks.decode_cost
	OMP_NUM_THREADS=$$(nproc) $(PY) -m benchmarks.checkpoint
	OMP_NUM_THREADS=$$(nproc) $(PY) -m benchmarks.guards
	$(PY) -m benchmarks.data

clean:
	rm -rf $(VENV) build *.egg-info
