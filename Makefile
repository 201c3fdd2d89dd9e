# Each target is a few commands. PYTHON: the interpreter that .venv is made with.
PYTHON ?= python3
BIN := .venv/bin
CI ?= false
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# The tests start hundreds of interpreters: what these import is compiled once, whatever the environment says.
export PYTHONDONTWRITEBYTECODE =

FUZZ_SECONDS ?= 600

.PHONY: build run check test prove fuzz bench clean

build: .venv/built

.venv/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "python3 is missing: apt-get install python3 python3-venv python3-dev gcc make"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "the venv module is missing: apt-get install python3-venv"; exit 1; }
	@command -v gcc >/dev/null || { echo "a C compiler is missing: apt-get install gcc python3-dev"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' \
		|| { echo "Python.h is missing: apt-get install python3-dev"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip

.venv/requirements: pyproject.toml | .venv/bin/python
	$(BIN)/python tools/requirements.py > .venv/requirements.txt
	$(BIN)/pip install -q -r .venv/requirements.txt
	@touch $@

.venv/built: .venv/requirements setup.py $(wildcard relaymta/_speedups/*.py relaymta/_speedups/*.pyx relaymta/_speedups/*.pxd)
	PYTHONWARNINGS=ignore $(BIN)/pip install -q --no-build-isolation --no-deps -e .
	@touch $@ relaymta/_speedups/*.so

run: build
	@$(BIN)/python -I -m relaymta.cli.demo

check: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: build
	CI=$(CI) $(BIN)/python -m pytest -n 4 --dist worksteal

prove: build
	RELAYMTA_PROVE=1 $(BIN)/python -m pytest -n 4 --dist worksteal -m "prove or not prove" --timeout 3600
	$(MAKE) fuzz
	mkdir -p build/bench
	for which in idle large backlog stragglers sites crowd endpoint mailboxes imap imap_large; do $(BIN)/python -m benchmarks.$$which > build/bench/$$which.json || exit 1; done
	$(BIN)/python -m benchmarks.hostile
	$(BIN)/python -m benchmarks.run --json build/bench/run.json
	$(BIN)/python -m benchmarks.report build/bench docs/benchmarks.md

fuzz: build
	$(BIN)/pip install -q "atheris>=3"
	for target in smtp replies session pop3 imap connection sasl header proxy mime search sieve managesieve clamd spamd milter policy; do $(BIN)/python -m tests.fuzz $$target $(FUZZ_SECONDS) -verbosity=0 || exit 1; done

bench: build
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf .venv build relaymta/_speedups/*.so relaymta/_speedups/*.c *.egg-info
