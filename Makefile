# The two commands: `make run` and `make test`. Everything else is for developers.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INTEGRATIONS := $(VENV)-integrations
# What requests meet between the client and the engine.
DOOR_TESTS := $(patsubst %,tests/gateway/test_%.py,alias auth hung_engines inference limits pictures_in_chats remote \
	replicas restart supervision tiers waiting)
# Engines start faster when pip compiles them, and a later start never writes into the tree.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test test-plain test-integrations lint types install clean

run: $(VENV)/.installed                ## install, fetch a small model, and have it answer
	$(BIN)/hostler serve -c configs/quickstart.yaml --prompt "The capital of France is"

test: $(VENV)/.installed-test          ## every test, real engines included
	$(BIN)/python -m pytest
	@$(MAKE) --no-print-directory test-integrations

test-plain: $(VENV)/.installed-test    ## those of the door, with all requests by the plain way
	HOSTLER_DOOR=plain $(BIN)/python -m pytest -m "not engine and not both_doors" $(DOOR_TESTS)

test-integrations: $(INTEGRATIONS)/.installed  ## other people's packages, which need older libraries
	$(INTEGRATIONS)/bin/python -m pytest tests/integrations

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

install: $(VENV)/.installed

$(VENV)/bin/python $(INTEGRATIONS)/bin/python: %/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Hostler needs Python 3.11 or newer: make run PYTHON=python3.12")'
	$(PYTHON) -m venv $*
	$@ -m pip install --quiet --upgrade 'pip>=25.1'

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e '.[test,dev]'
	@touch $@ $(VENV)/.installed

$(INTEGRATIONS)/.installed: pyproject.toml | $(INTEGRATIONS)/bin/python
	$(INTEGRATIONS)/bin/python -m pip install --quiet -e '.[integrations]'
	@touch $@

clean:
	rm -rf $(VENV) $(INTEGRATIONS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
