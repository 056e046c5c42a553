# What people type. `make pipeline` on a fresh clone is enough: it sets everything up first.
#
#   make pipeline ARGS="experiment=smoke"     pass overrides on
#   make test ARGS="tests/core -x"            pass options on (WORKERS=1: one process)
#   make setup PYTHON=python3.12              choose the interpreter
#   make setup TORCH="torch==2.12.0" PIP_FLAGS="..."
#                                             another build of torch, for a GPU; PIP_FLAGS goes to pip as it is

PYTHON ?= python3
VENV ?= .venv
TORCH ?=
PIP_FLAGS ?=
ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := kernels core moe mla rl serve
PROJECTS := pyproject.toml $(foreach p,$(PACKAGES),packages/$(p)/pyproject.toml)

.DEFAULT_GOAL := help
.PHONY: help setup pipeline test ui lint bench clean

help:  ## what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## .venv with everything installed; does nothing when nothing has changed

# The stamp is as new as the last installation; a changed project file or constraint makes it old. pip would compile
# 24,000 files in one process; compileall has one for each core. That templates among them do not compile is no failure.
$(STAMP): $(PROJECTS) constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "deepwright needs Python 3.11 or newer; $(PYTHON) is older. Name one: make setup PYTHON=python3.12" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	grep -vE '$(if $(TORCH),^(torch|triton)[=><],^$$)' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile $(PIP_FLAGS) -c $(VENV)/constraints.txt \
	  $(if $(TORCH),"$(TORCH)") $(foreach p,$(PACKAGES),-e packages/$(p)) -e ".[dev]"
	@$(BIN)/python -W ignore -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@

pipeline: setup  ## text to a served reasoning model
	$(BIN)/deepwright run pipeline $(ARGS)

test: setup  ## every test that this machine can run
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

ui: setup  ## the pages of the workflow and the tracker, and a worker
	$(BIN)/deepwright up $(ARGS)

lint: setup  ## style and types
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup  ## every benchmark, or those named: make bench ARGS="benchmarks/serve.py"
	@set -e; for script in $(if $(ARGS),$(ARGS),$(sort $(wildcard benchmarks/*.py))); do \
	  echo "== $$script"; $(BIN)/python $$script; done

clean:  ## everything that can be made again; runs/ is kept
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
	@if [ -d runs ]; then echo "runs/ is kept; remove it by hand if you do not need it."; fi
