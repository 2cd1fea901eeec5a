# `make demo` and `make test` set everything up themselves: Python >= 3.11, pip and make suffice.
# Another interpreter: `make test PYTHON=python3.12` (its environment is kept apart).

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
VENV ?= .venv/$(VERSION)
BIN := $(VENV)/bin
READY := $(VENV)/ready
LOCK := $(wildcard requirements/$(VERSION).txt)

# The newest Python that runs: on the path, or among those of pyenv, whose shims may be there and not run.
PYENV = $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions
NEWEST = $(firstword $(foreach v,3.13 3.12,$(shell for p in python$(v) $(PYENV)/$(v).*/bin/python; do \
  $$p -c 'import sys; print(sys.executable)' 2> /dev/null && break; done)))
CUDA ?= cuda13

.PHONY: demo test test-newest test-gpu bench-gpu docs gallery lint types tests lock clean

demo: $(READY)  ## train by SGD, Adam and C-SGD on real data: a table and a picture
	$(BIN)/python -m experiments quickstart $(ARGS)

test: lint types tests  ## everything that CI runs

test-newest:  ## the tests with the newest JAX, Flax and Optax of the index that the ranges allow
	@test -n "$(NEWEST)" || echo "No Python 3.12 or 3.13 was found; nothing to test"
	@test -z "$(NEWEST)" || $(MAKE) tests PYTHON=$(NEWEST) VENV=.venv/newest LOCK=

test-gpu: $(READY)  ## the tests that need a GPU, with JAX for CUDA=cuda12 or cuda13
	$(BIN)/pip install --disable-pip-version-check --quiet --editable '.[dev]' 'jax[$(CUDA)]'
	JAX_PLATFORMS=cuda $(BIN)/python -m pytest -n 0 tests/test_gpu.py $(ARGS)

bench-gpu: $(READY)  ## C-Adam beside Adam on a GPU, within nine minutes, with JAX for CUDA=cuda12 or cuda13
	$(BIN)/pip install --disable-pip-version-check --quiet --editable '.[dev]' 'jax[$(CUDA)]'
	JAX_PLATFORMS=cuda $(BIN)/python -m experiments bench --parts accelerator --budget 5 --compiles 1 $(ARGS)

docs: $(READY)  ## the site, in build/docs/index.html; every warning is an error
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs build/docs
	@echo "Open build/docs/index.html"

gallery: $(READY)  ## the gallery's figures anew, by its examples at full size
	cd docs/images/gallery && for example in ../../../examples/*.py; do \
	  MPLBACKEND=agg ../../../$(BIN)/python $$example || exit 1; done
	cd docs/images/gallery && MPLBACKEND=agg JAX_NUM_CPU_DEVICES=8 \
	  ../../../$(BIN)/python ../../../examples/many_devices.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/pyright --pythonpath $(BIN)/python

tests: $(READY)
	$(BIN)/python -m pytest $(ARGS)

lock:  ## renew requirements/pythonX.Y.txt from the ranges in pyproject.toml
	rm -rf $(VENV) requirements/$(VERSION).txt
	$(MAKE) $(READY) LOCK=
	$(BIN)/pip freeze --exclude-editable > requirements/$(VERSION).txt

clean:
	rm -rf .venv results

$(READY): pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "cqjax needs Python 3.11 or newer; $(PYTHON) is $(VERSION)"; exit 1; }
	$(PYTHON) -m venv $(VENV) > /dev/null || { $(PYTHON) -m venv --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }  # without ensurepip
	$(BIN)/pip install --disable-pip-version-check --quiet \
	  $(if $(LOCK),--constraint $(LOCK)) --editable '.[dev]'
	touch $@
