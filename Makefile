# Each target creates .venv from requirements.lock where it is absent or older than the lock.
PYTHON ?= python3
VENV   ?= .venv
PORT   ?= 5000
ARCHIVES ?= sunet64 sunet128 sunet7128
UV     ?= uv==0.13.9
PY     := $(VENV)/bin/python

# The stages of dvc.yaml call `python`: the environment's comes first ($(abspath) would break a path with spaces).
# PYTHONPATH is relative on purpose: a copy of the tree made by `dvc exp run --temp` runs its code, not this checkout's.
export PATH := $(if $(filter /%,$(VENV)),$(VENV),$(CURDIR)/$(VENV))/bin:$(PATH)
export PYTHONPATH := .
export MLFLOW_DISABLE_TELEMETRY := true
export DVC_NO_ANALYTICS := 1

.PHONY: help env lock unlocked repro repro-from-nothing transfer paper test test-gpu test-fast verify lint check zoo ui clean
help:  ## list these
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 20

env: $(VENV)/.stamp  ## create .venv from requirements.lock

$(VENV)/.stamp: requirements.lock pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# Pins that stand in the file stay; UPGRADE="--upgrade-package NAME" renews one, UPGRADE=--upgrade all. torch and
# torchvision move together: a torchvision built for another CUDA does not load beside this torch.
lock:  ## write requirements.lock anew from pyproject.toml, for every platform
	test -x .work/uv/bin/uv || $(PYTHON) -m venv .work/uv
	.work/uv/bin/python -m pip install --quiet --disable-pip-version-check $(UV)
	.work/uv/bin/uv pip compile --quiet --universal --python-version 3.11 --extra dev --no-header --no-annotate \
		--no-emit-index-url --no-emit-find-links $(UPGRADE) --output-file requirements.lock pyproject.toml

repro: env unlocked  ## run the pipeline of params.yaml: data, training, evaluation, cost, ablations, tables and figures
	$(VENV)/bin/dvc repro

repro-from-nothing: env unlocked  ## run every stage again, trainings included, up to date or not
	rm -rf .work
	$(VENV)/bin/dvc repro --force

# A kill at the moment when DVC writes its table of locks leaves it empty, and DVC refuses an empty one ever after.
unlocked:
	@if [ -f .dvc/tmp/rwlock ] && [ ! -s .dvc/tmp/rwlock ]; then rm .dvc/tmp/rwlock; fi

# Chains: each preset starts from the weights of the one before. Killed, a chain goes on where it stopped: finished
# trainings and scores are found by what decides them.
transfer: env unlocked  ## show what pre-training gives, on embedded data: classify shapes, then segment
	$(PY) -m sunets preset transfer_shapes && $(VENV)/bin/dvc repro
	$(PY) -m sunets preset transfer_segmentation && $(VENV)/bin/dvc repro

paper: env unlocked  ## run the authors' recipe: ImageNet, COCO, VOC, multi-scale test, an archive of each model of ARCHIVES
	$(PY) -m sunets preset imagenet && $(VENV)/bin/dvc repro
	$(PY) -m sunets preset coco && $(VENV)/bin/dvc repro
	$(PY) -m sunets preset voc && $(VENV)/bin/dvc repro
	for model in $(ARCHIVES); do $(PY) -m sunets archive $$model || exit; done

test: env  ## run the tests
	$(PY) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-gpu: env  ## run the tests that need a GPU
	$(PY) -m pytest -m gpu

test-fast: env  ## run the tests that are not marked slow
	$(PY) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "not slow"

verify: env  ## check that dvc.lock and results/ belong to this code and these parameters
	$(PY) -m sunets verify

lint: env  ## lint, format, types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

check: lint test  ## lint, format, types, tests

zoo: env  ## count every network of the zoo: the tables of docs/cost.md; draw the architecture
	$(PY) -m sunets zoo
	$(PY) docs/architecture.py

# MLflow's own start page shows traces of agents: the links that mlflow-sync prints show the runs.
ui: env  ## open MLflow on this checkout's runs, and print the links that show them
	@echo "bringing MLflow in line with results/; the first time takes a minute"
	-@$(PY) -m sunets mlflow-sync --pages http://127.0.0.1:$(PORT)
	@if [ -n "$$DISPLAY$$WAYLAND_DISPLAY" ] || [ "$$(uname)" = Darwin ]; then \
	  (sleep 5; $(PY) -m webbrowser -t "http://127.0.0.1:$(PORT)/#/experiments?workflowType=machine_learning") & fi
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(VENV)/bin/mlflow ui --workers 1 --port $(PORT) --backend-store-uri "$(or $(MLFLOW_TRACKING_URI),sqlite:///mlflow.db)"

clean:  ## delete what can be made again: checkpoints, prepared data, outputs, the MLflow database
	rm -rf .work data/prepared outputs mlflow.db* mlruns
