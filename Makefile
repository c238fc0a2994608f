# make setup | test | test-all | test-minimum | test-projects | test-targets | fuzz | demo | docs | docs-pictures | wheel | package | clean

PYTHON ?= python3
# Installed first, so that a CPU build is taken where the package index offers one (2.13.0+cpu
# counts as newer than 2.13.0). Any torch>=2.6 will do: make setup TORCH=torch==2.6.0
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/.demo
READY := $(VENV)/.ready
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: setup check test test-all test-minimum test-projects test-targets fuzz demo docs docs-serve docs-pictures wheel package clean

setup: $(READY)

# The library and the demo's data, no more.
$(DEMO): pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install "$(TORCH)"
	$(BIN)/python -m pip install -e ".[demo]"
	touch $@

# What the tests need, too.
$(READY): $(DEMO)
	$(BIN)/python -m pip install -e ".[test,demo]"
	which chromium chromium-browser google-chrome | grep -q . || timeout 300 apt-get install -y --no-install-recommends chromium \
		|| echo "No Chromium: the tests that look at pages will be skipped."
	touch $@

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell
	$(BIN)/mypy

test: check
	$(PYTEST) -m "not slow"

test-all: check
	$(PYTEST)

# The oldest versions that pyproject.toml allows (torch 2.6 comes with CUDA: 3 GB); writes tests/minimum/results.md.
MINIMUM := .venv-minimum

$(MINIMUM)/.ready: pyproject.toml setup.py
	test -x $(MINIMUM)/bin/python || $(PYTHON) -m venv $(MINIMUM)
	$(MINIMUM)/bin/python -m pip install --no-deps -e .
	$(MINIMUM)/bin/python tests/minimum/run.py --requirements > $(MINIMUM)/requirements.txt
	$(MINIMUM)/bin/python -m pip install -r $(MINIMUM)/requirements.txt
	touch $@

test-minimum: $(MINIMUM)/.ready
	$(MINIMUM)/bin/python tests/minimum/run.py

# Released projects of the package index, each trained quantized for some steps; writes tests/projects/results.md.
PROJECTS := .venv-projects

$(PROJECTS)/.ready: pyproject.toml setup.py tests/projects/requirements.txt
	test -x $(PROJECTS)/bin/python || $(PYTHON) -m venv $(PROJECTS)
	$(PROJECTS)/bin/python -m pip install "$(TORCH)"
	$(PROJECTS)/bin/python -m pip install -e . -r tests/projects/requirements.txt
	touch $@

test-projects: $(PROJECTS)/.ready
	$(PROJECTS)/bin/python tests/projects/run.py

# Files of the targets whose runtimes are large, each in its own runtime.
TARGETS := .venv-targets

$(TARGETS)/.ready: pyproject.toml setup.py tests/targets/requirements.txt
	test -x $(TARGETS)/bin/python || $(PYTHON) -m venv $(TARGETS)
	$(TARGETS)/bin/python -m pip install "$(TORCH)"
	$(TARGETS)/bin/python -m pip install -e ".[demo,onnx,openvino,gguf,compressed-tensors]" hypothesis pytest pytest-xdist
	$(TARGETS)/bin/python -m pip install --no-deps -r tests/targets/requirements.txt
	touch $@

test-targets: $(TARGETS)/.ready
	OMP_NUM_THREADS=1 $(TARGETS)/bin/python -m pytest -n 2 tests/targets tests/export/test_gguf_llama_cpp.py tests/export/test_mlx.py

# Ten thousand mutated inputs; ends with a table, tests/fuzz/RESULTS.md, and exit status 1 where one ended as it must not.
fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.run --seed 0 --count 10000 --write

demo: $(DEMO)
	$(BIN)/python -m lq_plugin.demo

# The documentation site, static files in site/, with every link checked; on a web server for a look: make docs-serve.
# The API pages import the ONNX functions.
$(VENV)/.docs: $(DEMO)
	$(BIN)/python -m pip install -e ".[docs,onnx]"
	touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	$(BIN)/python docs/site/check_links.py site

docs-serve: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

# The README's pictures, from a demo of their own.
docs-pictures: setup
	rm -rf runs/docs
	$(BIN)/python -m lq_plugin.demo --output runs/docs
	$(BIN)/python -m examples.docs_pictures runs/docs

wheel: setup
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

# Wheel and sdist, and whether the package index takes them.
package: $(DEMO)
	rm -rf dist
	$(BIN)/python -m pip install "build>=1.2" "twine>=6.1"
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis site
