# Two commands on a fresh machine: `make demo` and `make test`. `make help` lists the rest.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt
# What pip installs, by all cores: pip takes one for it, and more than a minute. Under PYTHONDONTWRITEBYTECODE, as in many
# containers, each process would otherwise compile torch anew (an import of 4 s instead of 1.5). Packages also bring files
# that no Python 3 takes.
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
STUBS := shardserve/wire/stubs

.PHONY: help system-packages demo test unit e2e test-gpu lint format stubs bench bench-zoo bench-peers clean

help: ## list the targets
	@grep -E '^[a-z0-9%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	$(COMPILE)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	$(COMPILE)
	@touch $@

demo: $(VENV)/.installed ## export the matmul model, serve it on 8 ranks, call it, lose a rank, stop
	$(BIN)/python examples/matmul_distributed/demo.py

$(VENV)/.installed-examples: $(VENV)/.installed
	$(PIP) --editable '.[examples]'
	$(COMPILE)
	@touch $@

example-%: $(VENV)/.installed-examples ## one with trained weights: example-sentence-embeddings, example-image-classification
	$(BIN)/python examples/$(subst -,_,$*)/run.py

test: unit e2e ## all tests

# Even on many cores: what they start has processes and threads of its own.
TWO_AT_A_TIME := --numprocesses 2 --dist loadfile

unit: $(VENV)/.installed-dev ## the tests of single modules
	$(BIN)/python -m pytest tests/unit $(TWO_AT_A_TIME)

# These bound the seconds until answers come again; a compiler gets only what nobody else takes.
ONE_AT_A_TIME := $(patsubst %,tests/chaos/test_%.py,process_deaths rank_deaths hangs) tests/e2e/test_compilation.py

e2e: $(VENV)/.installed-dev ## the tests of whole servers, with and without deaths
	$(BIN)/python -m pytest tests/e2e tests/chaos $(TWO_AT_A_TIME) $(addprefix --ignore=,$(ONE_AT_A_TIME))
	$(BIN)/python -m pytest $(ONE_AT_A_TIME)

test-gpu: $(VENV)/.installed-dev ## what needs a GPU; fails where there is none
	$(BIN)/python -m pytest tests/gpu

system-packages: ## what tests of several hosts need of the system (iproute2, openssl), where apt-get and root are there
	@command -v ip >/dev/null && command -v openssl >/dev/null || { apt-get update -qq && apt-get install -y -qq iproute2 openssl; }

lint: $(VENV)/.installed-dev ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev ## have ruff format everything
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

stubs: $(VENV)/.installed-dev ## generate the gRPC stubs from protos/
	$(BIN)/python protos/generate.py

BENCHMARKS := smoke overhead collectives sharded pipelining batching front large dispatch recording window steady costs layouts export-memory state

bench: $(addprefix bench-,$(BENCHMARKS)) ## all figures of docs/performance.md, one after the other, on a machine that does nothing else

bench-%: $(VENV)/.installed-dev ## one of them: bench-smoke, bench-overhead, bench-collectives, bench-sharded, …
	$(BIN)/python -m benchmarks.$(subst -,_,$*)

bench-zoo: $(VENV)/.installed-dev ## models of many families in each layout: exported, compared, counted; writes docs/zoo.md
	$(BIN)/python -m benchmarks.zoo --docs

bench-peers: $(VENV)/.installed-dev ## beside a running Triton: make bench-peers TRITON="ADDRESS MODEL"
	$(PIP) 'tritonclient[grpc]'
	$(BIN)/python -m benchmarks.peers --triton $(TRITON)

clean: ## remove what make made
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info examples/*/model results
