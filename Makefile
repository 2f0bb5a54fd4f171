# Everything happens in .venv, made on first use. On a machine without a GPU, torch's smaller CPU build is taken with
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt

.PHONY: test demo bench lint clean

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --maxprocesses 8

demo: $(INSTALLED)
	$(BIN)/dynexec demo

bench: $(INSTALLED)
	$(BIN)/dynexec bench

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# The native part needs torch and the build tools to be there first; `dynexec info` shows whether it was built.
$(INSTALLED): pyproject.toml setup.py CMakeLists.txt constraints.txt Makefile $(shell find csrc -type f)
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools cmake ninja pybind11 torch numpy
	$(PIP) --no-build-isolation -e ".[test,bench,demo,dev]"
	$(BIN)/python -c "import triton" || $(PIP) triton==3.6.0 || echo "the Triton kernels will not be tested"
	$(BIN)/dynexec info
	touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info dynexec/*.so dynexec/*_build_failure.txt
