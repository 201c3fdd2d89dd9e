# Each target is a few commands. PYTHON: the interpreter that .venv is made with. That of the distribution is preferred, where it can
# build: it was compiled with profile-guided optimisation, which those of version managers often are not (`relaymta doctor`).
PYTHON ?= $(shell /usr/bin/python3 -c $(CAN_BUILD) 2>/dev/null && echo /usr/bin/python3 || echo python3)
CAN_BUILD := 'import ensurepip, os, sys, sysconfig, venv; sys.exit(sys.version_info < (3, 11) or not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'
BIN := .venv/bin
CI ?= false
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# The tests start hundreds of interpreters: what these import is compiled once, whatever the environment says.
export PYTHONDONTWRITEBYTECODE =

FUZZ_SECONDS ?= 600

.PHONY: build run check test test-packages prove fuzz bench wheels deb clean

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
	CI=$(CI) $(BIN)/python -m pytest -n 6 --dist worksteal

# They need root, debootstrap and systemd-nspawn, and a few minutes.
test-packages: wheels
	CI=$(CI) $(BIN)/python -m pytest -m packages tests/packages

# Our wheel, and those of all that it needs. (Modules that are gone would stay in build/, and so in the wheel.)
wheels: build
	@rm -f build/wheels/relaymta-*.whl
	@if [ -d build ]; then find build -path 'build/lib.*' -name '*.py' -delete; fi
	$(BIN)/pip wheel -q --no-build-isolation -w build/wheels .

deb: wheels
	mkdir -p dist
	packaging/deb/build build/wheels dist

prove: build
	RELAYMTA_PROVE=1 $(BIN)/python -m pytest -n 6 --dist worksteal -m "prove or not prove" --timeout 3600
	$(MAKE) fuzz
	mkdir -p build/bench
	for which in idle large backlog stragglers sites crowd endpoint mailboxes imap imap_large watched; do $(BIN)/python -m benchmarks.$$which > build/bench/$$which.json || exit 1; done
	$(BIN)/python -m benchmarks.hostile
	$(BIN)/python -m benchmarks.run --json build/bench/run.json
	$(BIN)/python -m benchmarks.report build/bench docs/benchmarks.md

fuzz: build
	$(BIN)/pip install -q "atheris>=3"
	for target in smtp replies session pop3 imap connection sasl header proxy mime search sieve managesieve clamd spamd milter policy http message template form sendmail; do $(BIN)/python -m tests.fuzz $$target $(FUZZ_SECONDS) -verbosity=0 || exit 1; done

# Postfix beside it, where it is installed and root asks.
bench: build
	@$(BIN)/relaymta bench --duration 20s $$([ "$$(id -u)" = 0 ] && PATH=$$PATH:/usr/sbin command -v postfix >/dev/null && echo --peer postfix)

clean:
	rm -rf .venv build dist relaymta/_speedups/*.so relaymta/_speedups/*.c *.egg-info
