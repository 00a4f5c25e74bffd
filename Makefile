# Every target sets up .venv first; that is quick when nothing changed.
#   PYTHON=python3.12 make test    the interpreter that .venv is made from (3.11 or later)
#   VLLM=cuda make test            vLLM's CUDA build instead of its CPU build

PYTHON ?= python3
VLLM ?= cpu
VENV := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench clean

help:
	@echo "make demo    run a controller script in a real vLLM server on this machine"
	@echo "make test    lint, type check, and run every test"
	@echo "make bench   run every benchmark"
	@echo "make lint    ruff and mypy only"
	@echo "make format  let ruff rewrite the layout of the code"
	@echo "make clean   remove .venv and caches (the embedded model stays)"

setup:
	@$(PYTHON) scripts/setup.py $(VLLM)

demo: setup
	@$(VENV) examples/demo.py

test: lint
	$(VENV) -m pytest

lint: setup
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	$(VENV) -m mypy

format: setup
	$(VENV) -m ruff check --fix .
	$(VENV) -m ruff format .

bench: setup
	@set -e; for program in benchmarks/[a-z]*.py; do \
	  echo "== $$program"; $(VENV) $$program; \
	done

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
