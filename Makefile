# make repro | test | check | ui | env: each creates .venv from requirements.lock where it is absent or older than the lock.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python

# The stages of dvc.yaml call `python`: the environment's comes first. PYTHONPATH is relative on purpose, so that a
# copy of the tree made by `dvc exp run --temp` runs its own code and not this checkout's.
export PATH := $(abspath $(VENV))/bin:$(PATH)
export PYTHONPATH := .
export MLFLOW_DISABLE_TELEMETRY := true
export DVC_NO_ANALYTICS := 1

.PHONY: help env repro test check ui clean
help:
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

env: $(VENV)/.stamp  ## create .venv from requirements.lock

$(VENV)/.stamp: requirements.lock pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@
