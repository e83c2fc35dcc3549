# The two commands of the README are `make demo` and `make test`; each sets up what it needs.
SHELL := /bin/bash
PYTHON ?= python3
POLAR := .venv/bin/polar
STAMP := .venv/.installed

.PHONY: demo test test-slow lint docs up clean help bench-dedup bench-beam

help: ## List the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'Python 3.11 or newer is needed: make PYTHON=python3.11 ...'; exit 1; }
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@echo 'Installing into .venv (about three minutes the first time) ...'
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## The whole chain on the embedded pool: policies to report, ten minutes.
	@$(POLAR) run --config configs/demo.yaml

up: $(STAMP) ## The Dagster UI on the same home.
	@$(POLAR) up

test: $(STAMP) ## The default test suite, on two cores.
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadgroup

test-slow: $(STAMP) ## The slow suite: whole runs, kills, browsers.
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m slow -n 2 --dist loadgroup

lint: $(STAMP) ## Style and types.
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

docs: $(STAMP) ## Write the generated pages again.
	@.venv/bin/python -m pipelines.lake_docs

bench-dedup: $(STAMP) ## Dedup beside datatrove, text-dedup, rensa, datasketch: ARGS="--data DIR".
	@.venv/bin/python benchmarks/dedup/bench.py $(ARGS)

bench-beam: $(STAMP) ## The signature stage on one process and on two: ARGS="--data DIR".
	@.venv/bin/python benchmarks/beam.py $(ARGS)

clean: ## Remove the environment; the home (var) stays.
	rm -rf .venv
