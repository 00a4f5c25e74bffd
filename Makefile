# Every target sets up .venv first; that is quick when nothing changed.
#   PYTHON=python3.12 make test    the interpreter that .venv is made from (3.11 or later)
#   VLLM=cuda make test            vLLM's CUDA build instead of its CPU build

PYTHON ?= python3
VLLM ?= cpu
VENV := .venv/bin/python
BENCHMARKS := main_job host_step masks mask_kernel growth sandbox script_steps fork agents recursive \
  overhead throughput neighbours

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full lint format bench bench-full clean

help:
	@echo "make demo    run a controller script in a real vLLM server on this machine"
	@echo "make test    lint, type check, and run the tests"
	@echo "make test-full  every test in every engine regime (an hour)"
	@echo "make bench   run the benchmarks, small; tables, JSON and plots go to build/benchmarks"
	@echo "make bench-full  the same, longer and with more cases (hours)"
	@echo "make lint    ruff and mypy only"
	@echo "make format  let ruff rewrite the layout of the code"
	@echo "make clean   remove .venv and caches (the embedded model stays)"

setup:
	@$(PYTHON) scripts/setup.py $(VLLM)

demo: setup
	@$(VENV) examples/demo.py

test: lint
	$(VENV) -m pytest

test-full: lint
	$(VENV) -m pytest -m ""

lint: setup
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	$(VENV) -m mypy

format: setup
	$(VENV) -m ruff check --fix .
	$(VENV) -m ruff format .

bench: setup
	@set -e; for name in $(BENCHMARKS); do \
	  echo "== benchmarks/$$name.py"; $(VENV) benchmarks/$$name.py; \
	done

bench-full: setup
	@set -e; for name in $(BENCHMARKS); do \
	  echo "== benchmarks/$$name.py --full"; $(VENV) benchmarks/$$name.py --full; \
	done

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
