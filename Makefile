# Needs Python 3.10 or newer and make; everything else is installed into .venv on first use.
PYTHON ?= python3
TORCH_VERSION ?= 2.13.0
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help demo space test style hub

help:
	@echo "make demo   generate with and without the bundled drafter and compare"
	@echo "make space  serve the page on which both race, at http://127.0.0.1:7860"
	@echo "make test   lint, format check and tests"
	@echo "make style  apply the lint fixes and the format"
	@echo "make hub    start a Hub of your own on this machine, to try pushing and pulling"

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or newer is needed, but '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "torch==$(TORCH_VERSION)"
	$(BIN)/python -m pip install -e ".[test]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/ppow demo

space: $(STAMP)
	$(BIN)/ppow space

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/browser.py
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

style: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hub: $(STAMP)
	$(BIN)/python -m tests.hub
