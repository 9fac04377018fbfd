# Every command of the project. `make` alone lists them.
#
#   make bench                              its own environment in .venv, made on first use
#   make bench TORCH_INDEX=https://download.pytorch.org/whl/cpu      … with torch from that index (no CUDA)
#   make bench PYTHON=python3               that interpreter and its torch as they are; nothing is installed over them

BASE_PYTHON ?= python3
VENV ?= .venv
INTEROP_VENV ?= .venv-interop
JOBS ?= 2
OUT ?= benchmarks/results

export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

ifeq ($(origin PYTHON),undefined)
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
else
PY := $(abspath $(shell command -v $(PYTHON) 2>/dev/null))
READY := given-environment
endif

PIP_INSTALL = $(PY) -m pip install -c constraints.txt
INTEROP_PIP = $(INTEROP_VENV)/bin/python -m pip install -c constraints.txt
# Tests run in $(JOBS) processes, one torch thread each, where pytest-xdist is installed.
WORKERS = $$($(PY) -c 'import xdist' 2>/dev/null && echo "-n $(JOBS) --dist loadfile")

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help bench test test-interop check lint types dist-check gpu clean given-environment

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F '|' '{printf "%-18s %s\n", $$1, $$2}'

bench: $(READY) ## the main job: kernels and reconstruction, ending in a report (BENCH_ARGS=…)
	$(PY) benchmarks/run.py $(BENCH_ARGS)

test: $(READY) ## the whole test suite (PYTEST_ARGS=…, JOBS=2)
	$(PY) -m pytest $(WORKERS) -m 'not serial' $(PYTEST_ARGS)
	$(PY) -m pytest -m serial $(PYTEST_ARGS) || [ $$? -eq 5 ]  # 5: PYTEST_ARGS selected none of these

test-interop: $(INTEROP_VENV)/.installed ## against SAELens, sparsify and dictionary_learning, in an environment of their own
	$(INTEROP_VENV)/bin/python -m pytest -m interop $(PYTEST_ARGS)

check: lint types test ## what continuous integration runs

lint: $(READY) ## ruff
	$(PY) -m ruff check .

types: $(READY) .links/sae_kernels ## mypy
	$(PY) -m mypy

dist-check: $(READY) ## sdist, wheel from the sdist, a fresh environment, a first use away from here
	PY='$(PY)' TORCH_INDEX='$(TORCH_INDEX)' sh -eu -c "$$dist_check"

gpu: ## on a GPU machine, no network needed: GPU tests, compute-sanitizer, benchmarks; all logs in OUT
	OUT='$(OUT)' PYTHON='$(or $(PYTHON),python3)' bash benchmarks/gpu.sh

clean: ## remove build products and caches; .venv and .venv-interop stay
	rm -rf build dist .links *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find benchmarks kernels sae_engine tests -name __pycache__ -type d -prune -exec rm -rf {} +

.links/sae_kernels:
	@mkdir -p .links && ln -sfn ../kernels $@

# Environments. The mark `.installing` lies in ours until all of it is there: one that was cut off is made afresh.
$(VENV)/.installed: pyproject.toml constraints.txt
	@[ ! -e $(VENV)/.installing ] || rm -rf $(VENV)
	@$(BASE_PYTHON) -c '$(old)' || $(call stop,$(BASE_PYTHON) is missing or older than Python 3.10: make BASE_PYTHON=python3.12)
	@mkdir -p $(VENV) && touch $(VENV)/.installing && rm -f $@
	$(BASE_PYTHON) -m venv $(VENV) || $(call stop,$(BASE_PYTHON) -m venv failed; on Debian: apt install python3-venv)
	$(PIP_INSTALL) setuptools
	$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)') torch
	$(PIP_INSTALL) --no-build-isolation -e '.[bench,test,dev]'
	@mv $(VENV)/.installing $@

$(INTEROP_VENV)/.installed: pyproject.toml constraints.txt tests/interop-requirements.txt tests/interop-requirements-no-deps.txt
	@[ ! -e $(INTEROP_VENV)/.installing ] || rm -rf $(INTEROP_VENV)
	@$(BASE_PYTHON) -c '$(old)' || $(call stop,$(BASE_PYTHON) is missing or older than Python 3.10: make BASE_PYTHON=python3.12)
	@mkdir -p $(INTEROP_VENV) && touch $(INTEROP_VENV)/.installing && rm -f $@
	$(BASE_PYTHON) -m venv $(INTEROP_VENV) || $(call stop,$(BASE_PYTHON) -m venv failed; on Debian: apt install python3-venv)
	$(INTEROP_PIP) setuptools
	$(INTEROP_PIP) $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)') torch
	$(INTEROP_PIP) --no-build-isolation -e . pytest -r tests/interop-requirements.txt
	$(INTEROP_PIP) --no-deps -r tests/interop-requirements-no-deps.txt
	@mv $(INTEROP_VENV)/.installing $@

# The interpreter that PYTHON names must have torch. This tree is made importable there; its packages stay as they are.
given-environment:
	@[ -n '$(PY)' ] || $(call stop,PYTHON=$(PYTHON) is no command here)
	@$(PY) -c '$(old)' || $(call stop,$(PY) is older than Python 3.10)
	@$(PY) -c 'import torch' || $(call stop,$(PY) has no torch: install it or leave PYTHON out and have make create $(VENV))
	@case $$(cd / && $(PY) -c '$(whose)') in ours) ;; \
	  none) $(PY) -m pip install --no-deps --no-build-isolation -e . || $(call stop,$(PY) needs setuptools 77 or newer) ;; \
	  *) $(call stop,$(PY) has another sae_engine: $(PY) -m pip uninstall sae-engine) ;; esac

stop = { echo 'make: $(1)' >&2; exit 1; }
old = import sys; sys.exit(sys.version_info < (3, 10))
whose = import importlib.util as u, os; s = u.find_spec("sae_engine"); \
  print("none" if s is None else "ours" if os.path.samefile(os.path.dirname(s.origin or "/"), "$(CURDIR)/sae_engine") else "other")

define dist_check
work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; trap 'exit 130' INT TERM
"$$PY" -m build --no-isolation --outdir "$$work/dist" .
python=$$work/venv/bin/python
"$$PY" -m venv "$$work/venv"
"$$python" -m pip install -c constraints.txt $${TORCH_INDEX:+--index-url "$$TORCH_INDEX"} torch
"$$python" -m pip install -c constraints.txt "$$work"/dist/*.whl
cd "$$work"
"$$python" -c 'import torch, sae_engine as se; print(se.__file__); print(se.functional.topk(torch.randn(4, 64), 3))'
"$$work/venv/bin/sae-engine" info
endef
export dist_check
