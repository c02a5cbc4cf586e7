# Every target runs in .venv, which is set up when it is missing or older than the requirements.

PYTHON ?= python3
DATA   ?= hpo
NAME   ?=
ARGS   ?=

BIN        := .venv/bin
READY      := .venv/.ready
# Two at once: in most of the long tests both cores wait. A file stays on one worker, since its tests share fixtures.
# ARGS="-n 0" runs all in this process.
PYTEST     := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
BENCHMARKS := $(filter-out _%,$(basename $(notdir $(sort $(wildcard benchmarks/training/*.py benchmarks/tagging/*.py benchmarks/quality/*.py)))))

# No target contacts a model hub, reports usage, or tokenises on more cores than Ray has assigned.
export HF_HUB_OFFLINE          ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0
export TOKENIZERS_PARALLELISM  ?= false

# These start a Ray of their own, on this machine and for this run only. Unset, the mode would be `token`: it leaves a token
# in the home folder, which a later `ray start` there demands. A cluster that others can reach wants `token`, set on purpose.
demo test test-slow test-all test-cluster bench bench-quality: export RAY_AUTH_MODE ?= disabled

.PHONY: help demo test test-slow test-all test-cluster cluster check docs figures pictures house audit bench bench-name bench-quality \
	format clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(READY)  ## make the data, train, evaluate, tag; DATA=hpo, or a folder with train/test/labels.parquet
	@$(BIN)/python examples/demo.py --data $(DATA) $(ARGS)

test: $(READY)  ## run the tests, except those that take minutes each; ARGS="-k labels" for a part
	@$(PYTEST) $(ARGS)

test-slow: $(READY)  ## the tests that take minutes each: most of the fault matrix, clusters that grow and shrink
	@$(PYTEST) -m slow $(ARGS)

test-all: $(READY)  ## both in one run, as CI does
	@$(PYTEST) -m "slow or not slow" $(ARGS)

test-cluster: $(READY)  ## all tests that need a cluster, quick or slow, and those of the files in cluster/
	@$(PYTEST) -m "slow or not slow" tests/cluster tests/storage/test_lease.py $(ARGS)

cluster: $(READY)  ## a Ray cluster of two nodes on this machine, until Ctrl-C; ARGS="--grow 3" with an autoscaler
	@$(BIN)/python cluster/local.py $(ARGS)

check: $(READY)  ## format, lint, types, package imports
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

docs: $(READY)  ## the API reference in build/docs, from the docstrings; a warning is an error
	@$(BIN)/python docs/reference.py build/docs

figures: $(READY)  ## the figures of the docs, from kept results; ARGS="--report FILE" takes a picture of a report
	@$(BIN)/python -m benchmarks.figures $(ARGS)

house: $(READY)  ## lines, modules, the longest chain of imports; ARGS="--rev v0.1.0" for a commit
	@$(BIN)/python -m benchmarks.house $(ARGS)

audit: $(READY)  ## known vulnerabilities of the packages in constraints.txt; run it weekly, CI does not
	@$(BIN)/python cluster/audit.py

bench: bench-name $(READY)  ## run one benchmark alone; NAME=clustering
	@$(BIN)/python -m $(subst /,.,$(basename $(wildcard benchmarks/*/$(subst -,_,$(NAME)).py))) $(ARGS)

bench-quality: $(READY)  ## our recipes against every peer; ARGS="--sets tate --methods omikuji xmc_ray"
	@$(BIN)/python -m benchmarks.quality.quality $(ARGS)

bench-name:
	@$(if $(filter $(BENCHMARKS),$(subst -,_,$(NAME))),:,$(error $(if $(NAME),no benchmark is called $(NAME),NAME is missing); \
		run: make bench NAME=... with one of: $(subst _,-,$(BENCHMARKS))))

pictures: $(READY)  ## figures and screenshots for the docs; ARGS="--folder runs/hpo"; needs Chromium
	@$(BIN)/python examples/pictures.py $(ARGS)

format: $(READY)  ## format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## remove .venv, caches and build output; data and runs stay
	rm -rf .venv build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first, so that its build is settled before anything that depends on it.
$(READY): pyproject.toml constraints.txt
	@echo "setting up .venv; the first time takes a few minutes"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,demo]'
	@touch $@
