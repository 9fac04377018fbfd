# Every command of the project. `make` alone lists them.
#
#   make bench                              its own environment in .venv, made on first use
#   make bench TORCH_INDEX=https://download.pytorch.org/whl/cpu      … with torch from that index (no CUDA)
#   make bench PYTHON=python3               that interpreter and its torch as they are; nothing is installed over them

BASE_PYTHON ?= python3
VENV ?= .venv
PEERS_VENV ?= .venv-peers
JOBS ?= 2
OUT ?= benchmarks/results
KERNEL_REPORT ?= benchmarks/results/kernel-report/kernels

export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

ifeq ($(origin PYTHON),undefined)
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
else
PY := $(abspath $(shell command -v $(PYTHON) 2>/dev/null))
READY := given-environment
endif

# Quiet: one line a stage, which make prints; errors are shown whole.
PIP_INSTALL = $(PY) -m pip install --quiet -c constraints.txt
# Tests run in $(JOBS) processes, one torch thread each, where pytest-xdist is installed; tests/conftest.py orders files.
WORKERS = $$($(PY) -c 'import xdist' 2>/dev/null && echo "-n $(JOBS) --dist loadfile --no-loadscope-reorder")
# The files that may use a marker: importing all of them takes each process half a minute.
marked = $(shell grep -lw '$(1)' tests/test_*.py)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help bench rules bench-peers test test-compiled test-compiled-quick test-interop test-versions check lint types kernel-report architectures structure tune docs docs-serve dist-check gpu clean \
  given-environment

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F '|' '{printf "%-18s %s\n", $$1, $$2}'

bench: $(READY) ## the main job: operations, training steps, reconstruction; a report in under five minutes (ONLY=operations|training|quality …, BENCH_ARGS=…)
	@$(PY) benchmarks/run.py $(if $(ONLY),--only $(ONLY)) $(BENCH_ARGS)

rules: $(READY) ## every selection rule at the same L0, 4 L0s and 3 seeds, under an hour; begun anew it does what is missing (RULES_ARGS=…)
	@$(PY) benchmarks/rules.py $(RULES_ARGS)

bench-peers: $(PEERS_VENV)/.installed ## whole training steps beside other libraries, in their own environment (BENCH_ARGS=…)
	@$(PEERS_VENV)/bin/python benchmarks/run.py --only steps $(BENCH_ARGS)

test: $(READY) ## the whole test suite (PYTEST_ARGS=…, JOBS=2)
	$(PY) -m pytest $(WORKERS) -m 'not serial' $(PYTEST_ARGS)
	$(PY) -m pytest -m serial $(or $(PYTEST_ARGS),$(call marked,serial)) || [ $$? -eq 5 ]  # 5: PYTEST_ARGS selected none of these

# Compiled kernels on tests/emulator: several resident programs, warps preempted at random, what was compiled kept.
ARCH ?= sm_90
SEED ?= 1
COMPILED = CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 TRITON_CACHE_DIR='$(CURDIR)/.cache/triton' PTX_EMULATOR_RESIDENT=4 PTX_EMULATOR_QUANTUM=400
NEEDS_CXX = @command -v "$${CXX:-g++}" >/dev/null || $(call stop,the emulator is built with g++: apt-get install g++)

test-compiled: $(READY) ## compiled kernels without a GPU, every operation, with race and memory checks (ARCH=sm_90 or sm_80, sm_100; SEED=1, ALL=1)
	$(NEEDS_CXX)
	set -e; for arch in $(if $(ALL),sm_80 sm_90,$(ARCH)); do for seed in $(if $(ALL),1 2,$(SEED)); do \
	  $(COMPILED) PTX_EMULATOR_ARCH=$$arch PTX_EMULATOR_SEED=$$seed $(PY) -m pytest $(WORKERS) $(PYTEST_ARGS); done; done

test-compiled-quick: $(READY) ## every kernel, compiled for sm_80 and for sm_90, in small cases, and what is slow in the interpreter: what CI runs
	$(NEEDS_CXX)
	PYTHONPATH=tests/emulator $(COMPILED) $(PY) -c 'from ptx_emulator import runtime; runtime.library()'
	for arch in sm_80 sm_90; do $(COMPILED) PTX_EMULATOR_ARCH=$$arch PTX_EMULATOR_SEED=1 \
	  $(PY) -m pytest -m 'sanitizer or compiled or emulated' & running="$$running $$!"; done; \
	failed=0; for process in $$running; do wait $$process || failed=1; done; exit $$failed

test-interop: PY = $(PEERS_VENV)/bin/python
test-interop: $(PEERS_VENV)/.installed ## against SAELens, sparsify, dictionary_learning and circuit-tracer, in an environment of their own
	$(PEERS_VENV)/bin/python -m pytest $(WORKERS) -m interop $(or $(PYTEST_ARGS),$(call marked,interop))

test-versions: $(READY) ## every torch and Triton that is supported, each in an environment under .venvs (VERSIONS_ARGS=--quick)
	$(PY) tests/versions.py --torch-index '$(TORCH_INDEX)' --jobs $(JOBS) $(VERSIONS_ARGS)

check: lint types test ## lint, types and tests; .ci/run has what continuous integration runs beside them

lint: $(READY) ## ruff
	$(PY) -m ruff check .

types: $(READY) .links/sae_kernels ## mypy
	$(PY) -m mypy

kernel-report: $(READY) ## registers, spills, loads, occupancy of every kernel, compiled for four GPUs; needs none (REPORT_ARGS=…)
	$(PY) -W ignore benchmarks/kernel_report.py --jobs $(JOBS) --markdown $(KERNEL_REPORT).md --json $(KERNEL_REPORT).json $(REPORT_ARGS)

architectures: $(READY) ## every causal architecture of transformers, built tiny: which sites are right, which are refused (minutes)
	$(PY) -W ignore benchmarks/architectures.py

structure: $(READY) ## the code in numbers: files on the way of a call, import circles, lines, files of each operation
	$(PY) benchmarks/structure.py

docs: $(READY) $(if $(filter given-environment,$(READY)),,$(VENV)/.docs) ## the documentation as pages in docs/_build/html, every warning an error (DOCS_EXECUTE=off: without what its blocks print)
	$(PY) -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo 'docs/_build/html/index.html'

docs-serve: docs ## the same, shown on a port of this machine
	$(PY) -m http.server --directory docs/_build/html --bind 127.0.0.1 8000

dist-check: $(READY) ## sdist, wheel from the sdist, a fresh environment, a first use away from here
	PY='$(PY)' TORCH_INDEX='$(TORCH_INDEX)' sh -eu -c "$$dist_check"

tune: $(READY) ## the fastest launch configurations on this GPU, searched for given shapes, to a table (TUNE_ARGS=B,d,F,k …)
	$(PY) benchmarks/tune.py $(TUNE_ARGS)

gpu: ## on a GPU machine, no network needed, ten minutes: smoke, timings, tests, sanitizer; all of it in OUT (GPU_ARGS=…)
	$(or $(PYTHON),python3) benchmarks/gpu.py --out '$(OUT)' $(GPU_ARGS)

clean: ## remove build products and caches; .venv and .venv-peers stay
	rm -rf build dist .links *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis
	find benchmarks kernels sae_engine tests -name __pycache__ -type d -prune -exec rm -rf {} +

.links/sae_kernels:
	@mkdir -p .links && ln -sfn ../kernels $@

# Environments. The mark `.installing` lies in ours until all of it is there: one that was cut off is made afresh.
$(VENV)/.installed: pyproject.toml constraints.txt
	@[ ! -e $(VENV)/.installing ] || rm -rf $(VENV)
	@$(BASE_PYTHON) -c '$(old)' || $(call stop,$(BASE_PYTHON) is missing or older than Python 3.10: make BASE_PYTHON=python3.12)
	@mkdir -p $(VENV) && touch $(VENV)/.installing && rm -f $@
	@echo 'making the environment $(VENV) …'
	@$(BASE_PYTHON) -m venv $(VENV) || $(call stop,$(BASE_PYTHON) -m venv failed; on Debian: apt install python3-venv)
	@$(PIP_INSTALL) setuptools
	@echo 'installing torch$(if $(TORCH_INDEX), from $(TORCH_INDEX)) (it is large) …'
	@$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)') torch
	@echo 'installing sae-engine and what its tests and benchmarks need …'
	@$(PIP_INSTALL) --no-build-isolation -e '.[bench,test,dev]'
	@mv $(VENV)/.installing $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(READY)
	@echo 'installing what the documentation is built with …'
	@$(PIP_INSTALL) --no-build-isolation -e '.[docs]'
	@touch $@

# The libraries that we plug into and compare with.
$(PEERS_VENV)/.installed: PEERS_PIP = $(PEERS_VENV)/bin/python -m pip install --quiet -c constraints.txt
$(PEERS_VENV)/.installed: pyproject.toml constraints.txt peers-requirements.txt peers-requirements-no-deps.txt
	@[ ! -e $(PEERS_VENV)/.installing ] || rm -rf $(PEERS_VENV)
	@$(BASE_PYTHON) -c '$(old)' || $(call stop,$(BASE_PYTHON) is missing or older than Python 3.10: make BASE_PYTHON=python3.12)
	@mkdir -p $(PEERS_VENV) && touch $(PEERS_VENV)/.installing && rm -f $@
	@echo 'making the environment $(PEERS_VENV) …'
	@$(BASE_PYTHON) -m venv $(PEERS_VENV) || $(call stop,$(BASE_PYTHON) -m venv failed; on Debian: apt install python3-venv)
	@$(PEERS_PIP) setuptools
	@echo 'installing torch$(if $(TORCH_INDEX), from $(TORCH_INDEX)) (it is large) …'
	@$(PEERS_PIP) $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)') torch
	@echo 'installing sae-engine and what its tests and benchmarks need …'
	@$(PEERS_PIP) --no-build-isolation -e '.[bench,test]'
	@echo 'installing the libraries that we plug into and compare with …'
	@$(PEERS_PIP) -r peers-requirements.txt
	@$(PEERS_PIP) --no-deps -r peers-requirements-no-deps.txt
	@mv $(PEERS_VENV)/.installing $@

# The interpreter that PYTHON names must have torch. This tree is made importable there; its packages stay as they are.
given-environment:
	@[ -n '$(PY)' ] || $(call stop,PYTHON=$(PYTHON) is no command here)
	@$(PY) -c '$(old)' || $(call stop,$(PY) is older than Python 3.10)
	@$(PY) -c '$(torch)' || $(call stop,$(PY) has no torch: install it or leave PYTHON out and have make create $(VENV))
	@case $$(cd / && $(PY) -c '$(whose)') in ours) ;; \
	  none) echo 'making this tree importable for $(PY) …'; \
	    $(PY) -m pip install --quiet --no-deps --no-build-isolation -e . || $(call stop,$(PY) needs setuptools 77 or newer) ;; \
	  *) $(call stop,$(PY) has another sae_engine: $(PY) -m pip uninstall sae-engine) ;; esac

stop = { echo 'make: $(1)' >&2; exit 1; }
torch = import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)
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
