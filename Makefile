# Each target does its own set-up: a fresh machine needs Python 3.11 or 3.12, make and g++.
PYTHON ?= python3
VENV ?= .venv
# What `pip install -e .[...]` installs; .ci/run adds verl.
EXTRAS ?= dev
# For a CPU-only machine on the open internet: make train TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
ARGS ?=

comma := ,
BIN := $(VENV)/bin
# One stamp for each set of extras; it is older than the files below exactly when an install is due.
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
BUILD_FILES := pyproject.toml setup.py $(wildcard kernels/csrc/*)
PIP := $(BIN)/python -m pip --disable-pip-version-check
GPU := $(shell command -v nvidia-smi 2>/dev/null)

.PHONY: train train-short test test-slow test-gpu fuzz sanitize lint typecheck format install clean
.DELETE_ON_ERROR:

train: $(STAMP)
	$(BIN)/slipstream train experiment=quickstart $(ARGS)

train-short: $(STAMP)
	$(BIN)/slipstream train experiment=quickstart_short $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu $(ARGS)

# Damages token logs for half a minute; longer: make fuzz ARGS="--seconds 600 --seed 7"
fuzz: $(STAMP)
	$(BIN)/python tests/fuzz/fuzz_token_log.py --seconds 30 $(ARGS)

# The native index alone, without Python: memory errors and undefined behaviour first, then data races.
sanitize:
	@mkdir -p build/sanitize
	@for kind in address,undefined thread; do \
		echo "sanitize: $$kind"; \
		g++ -std=c++17 -O1 -g -Wall -Wextra -fsanitize=$$kind -fno-sanitize-recover=all -pthread \
			-Ikernels/csrc tests/native/suffix_driver.cpp -o build/sanitize/suffix_driver || exit 1; \
		build/sanitize/suffix_driver || exit 1; \
	done

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The umbrella package exists only once installed; links give the type checker the same view of the folders.
typecheck: $(STAMP)
	@mkdir -p .typing/slipstream
	@for room in conf drafter experiments kernels rollout trainer; do \
		ln -sfn ../../$$room .typing/slipstream/$$room; done
	MYPYPATH=.typing $(BIN)/python -m mypy -p slipstream

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP)

# torch first and on its own: left to the resolver a CPU machine would fetch the CUDA build. pip, not python, is
# what tells a complete environment from one whose making was interrupted.
$(STAMP): $(BUILD_FILES)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else \
		"slipstream: $(PYTHON) is Python %d.%d; allowed: 3.11 or 3.12, as in PYTHON=python3.11" % v)'
	@command -v g++ >/dev/null || \
		{ echo "slipstream: g++ was not found; install a C++17 compiler (Debian: apt-get install g++)"; exit 1; }
	@echo "slipstream: installing into $(VENV); the first time takes some minutes"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(if $(GPU),,$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0)
	$(PIP) install --quiet -e '.[$(EXTRAS)]'
	@touch $@

clean:
	rm -rf build dist *.egg-info .typing kernels/_native*.so
