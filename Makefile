# make demo and make test set everything up themselves. VENV names the virtual environment, PYTHON what makes it.
PYTHON ?= python3
VENV ?= .venv

python := $(VENV)/bin/python
stamp := $(VENV)/.timm-ghn-installed
pip := PIP_DISABLE_PIP_VERSION_CHECK=1 $(python) -m pip --no-input

.PHONY: demo test lint docs wheel-test setup clean
.DEFAULT_GOAL := test

demo: setup
	$(python) examples/demo.py

test: setup
	$(python) -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: setup
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m mypy

docs: setup $(stamp)-docs
	NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict

# BORROW=1 takes the third-party packages from $(VENV) instead of installing them (several GB) once more.
wheel-test: setup
	BORROW=$(BORROW) .ci/wheel-test $(python)

setup: $(stamp)

$(stamp): pyproject.toml
	test -x $(python) || $(PYTHON) -m venv $(VENV)
	$(pip) install --quiet --progress-bar off --editable '.[dev]'
	touch $@

$(stamp)-docs: pyproject.toml
	$(pip) install --quiet --progress-bar off --editable '.[docs]'
	touch $@

clean:
	rm -rf build dist demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis
