# What a developer types. It needs make and Python 3.11 or later; all else is put into .venv, from
# the locked sets in requirements/ (name, version and hash of each), and again when they change.

PYTHON ?= python3

BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check --no-input
# Wheels only: building from source would fetch build tools that no lock names. Nothing but what a lock
# names: left to itself, pip looks at newer versions of what an extra asks for ("coverage[toml]"), and
# then refuses them for having no hash.
INSTALL := $(PIP) install --no-deps --require-hashes --only-binary=:all: --progress-bar=off
COMPLETE = lacking=$$($(BIN)/python -m pip check) || \
  { echo "$$lacking; requirements/ is older than pyproject.toml: make lock" >&2; exit 1; }
# Tests and benchmarks see the installed wheel, and so does every process that they start; without
# this, agent/ of the checkout would hide it.
INSTALLED := PYTHONSAFEPATH=1
# Core, simulation, declarations and coordinator, without what is marked as long.
QUICK := tests/core tests/simulation tests/schema tests/coordinator -m 'not long' --numprocesses=2 --dist=worksteal
# Three workers on two cores, because most tests wait, and one that computes (tests/distribution.py). They are
# handed whole files, in the order of tests/conftest.py.
WORKERS := --numprocesses=4 --dist=loadfile --no-loadscope-reorder
SOURCES := $(shell find agent -type f ! -name '*.pyc') pyproject.toml README.md LICENSE

.PHONY: help demo run test quick test-components check bench editable lock clean FORCE
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## /\1: /p' Makefile

demo: .venv/.wheel  ## two agents, one group: watch one die and the other take over
	$(BIN)/failover-agent demo

run: .venv/.wheel  ## a coordinator on loopback, in the foreground
	$(BIN)/failover-agent serve

test: test-components .venv/.wheel .venv/.dev  ## the whole suite on the installed wheel, with the coverage gate
	$(INSTALLED) FAILOVER_TEST_INSTALLED=1 $(BIN)/pytest --cov $(WORKERS) --rerun-show-tracebacks
	@report=$$($(BIN)/coverage report --include='*/agent/core/*' --fail-under=100) || \
	  { echo "$$report"; echo "every branch of agent/core must be covered" >&2; exit 1; }

quick: .venv/.dev  ## the inner loop, under a minute on two cores: no processes, a short simulation, the checkout itself
	FAILOVER_SIMULATION_EXAMPLES=200 $(BIN)/python -m pytest -q -p no:cacheprovider $(QUICK)

test-components:  ## Debian packages that the suite wants (tests/components.txt), where that is allowed
	@tests/components.sh

check: .venv/.dev  ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: test-components .venv/.wheel .venv/.dev  ## the benchmarks, one after another
	@mkdir -p build/bench && ln -sfn ../../tests build/bench/tests
	@missed=0; for script in tests/bench/[!_]*.py; do name=$$(basename "$$script" .py); echo "== $$script"; \
	  $(INSTALLED) PYTHONPATH="$(CURDIR)/build/bench" $(BIN)/python -m "tests.bench.$$name" || missed=1; \
	  done; exit $$missed

editable: .venv/.dev  ## .venv with the checkout itself, for .venv/bin/pytest; `make test` ends it
	@rm -f .venv/.wheel
	$(PIP) install --no-deps --no-build-isolation --editable .

lock: .venv/.interpreter  ## resolve requirements/ anew from pyproject.toml
	@requirements/lock.sh

clean:  ## remove all that was made here
	rm -rf .venv build dist .coverage .coverage.* .hypothesis
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find agent tests -name __pycache__ -prune -exec rm -rf {} +

# .venv has one stamp for each thing in it. The first is wiped, with all others, when the interpreter
# or a lock is not the one that it was made for; FORCE asks each time, and costs one Python start.

.venv/.interpreter: FORCE
	@requirements/venv.sh "$(PYTHON)"

.venv/.runtime: .venv/.interpreter
	@echo "installing requirements/runtime.txt and build.txt into .venv"
	@$(INSTALL) -r requirements/runtime.txt -r requirements/build.txt
	@touch $@

.venv/.dev: .venv/.runtime
	@echo "installing requirements/dev.txt into .venv"
	@$(INSTALL) -r requirements/dev.txt
	@$(COMPLETE)
	@touch $@

# Changes when a source is added, removed or renamed, which no file's own time shows.
.venv/.sources: FORCE .venv/.interpreter
	@[ "$$(cat $@ 2>/dev/null)" = "$(sort $(SOURCES))" ] || echo "$(sort $(SOURCES))" > $@

.venv/.wheel: .venv/.runtime .venv/.sources $(SOURCES)
	@echo "building the wheel and installing it into .venv"
	@rm -rf build/wheel
	@$(BIN)/python -m hatchling build --target wheel --directory build/wheel
	@$(PIP) install --no-deps --no-index --force-reinstall build/wheel/*.whl
	@$(COMPLETE)
	@touch $@
