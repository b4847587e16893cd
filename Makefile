# The commands of this repository. Each prepares its own environment in $(VENV) and then needs no
# network until pyproject.toml or constraints.txt change.
#
#   make validate [ARGS="spectral_dynamics --profile full"]
#   make test     [ARGS="tests/test_exact.py -k balanced"]
#   make test     FULL=1                    as CI does: the tests marked apart too, and shapes and
#                                           dtypes checked at each call
#   make PYTHON=python3.13 VENV=.venv-3.13 test

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= 2
FULL ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Python compiles a module when it is first imported; most of what pip would compile never is.
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
  -c constraints.txt
# The flags that keep JAX right on CPU, for programs that are not the command itself.
GUARDED = XLA_FLAGS="$$($(BIN)/python -m lorajax.environment)"
# Those that make compiling cheap as well.
BRIEF = XLA_FLAGS="$$($(BIN)/python -m lorajax.environment --brief)"
# Threads of small products in NumPy wait for each other, which costs where programs run side by side.
ALONE = OPENBLAS_NUM_THREADS=1
COMMA := ,
CHECK_VERSION = import sys; sys.version_info >= (3, 11) or sys.exit('lorajax needs Python 3.11 or \
newer and $(PYTHON) is ' + sys.version.split()[0] + ': choose one with make PYTHON=...')
# The longest first, so that none is left alone at the end.
LONG = $(wildcard sims/xu2025/[a-z]*.py)
SIMS = $(LONG) $(filter-out $(LONG),$(wildcard sims/*/[a-z]*.py))
NOTEBOOKS = $(wildcard notebooks/[a-z]*.py)
# Mutants measure the tests, not the library against its peers, and have a command of their own.
BENCHMARKS = $(filter-out benchmarks/mutants.py,$(wildcard benchmarks/[a-z]*.py))

.PHONY: help validate test lint format typecheck figures notebooks docs benchmarks mutants constraints \
  release clean \
  $(SIMS) $(NOTEBOOKS)
.DELETE_ON_ERROR:

help:
	@echo "validate    check the theory against simulation: verdicts, figures, a report"
	@echo "test        run the tests and the doctests"
	@echo "lint        check style and formatting          (make format mends it)"
	@echo "typecheck   check types"
	@echo "figures     run every simulation in sims/ with its quick profile"
	@echo "notebooks   execute every notebook into out/notebooks/"
	@echo "docs        build the site into out/site, strictly, and check its links"
	@echo "benchmarks  run every benchmark against its peers (large downloads)"
	@echo "mutants     alter the theory's code and see whether the tests notice (about an hour)"
	@echo "release     build sdist and wheel into dist/, and try the wheel outside of this folder"
	@echo "constraints pin the newest releases that pyproject.toml allows"
	@echo "clean       remove environments, caches and results"

# One stamp for the package with its dependencies, one for each extra, which brings the package along.
$(BIN)/python:
	@$(PYTHON) -c "$(CHECK_VERSION)"
	@$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing lorajax and its dependencies into $(VENV) ..."
	@$(PIP_INSTALL) --editable .
	@touch $@

$(INSTALLED)-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing lorajax and what '$*' needs into $(VENV) ..."
	@$(PIP_INSTALL) --editable '.[$*]'
	@touch $(INSTALLED) $@

validate: $(INSTALLED)
	@$(BIN)/lorajax validate $(ARGS)

test: $(INSTALLED)-test
	@$(GUARDED) $(ALONE) $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup --no-loadscope-reorder \
  $(if $(FULL),--jaxtyping-packages=lorajax$(COMMA)beartype.beartype,-m 'not apart') $(ARGS)

lint: $(INSTALLED)-lint
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(INSTALLED)-lint
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

typecheck: $(INSTALLED)-lint $(INSTALLED)-text
	@$(BIN)/pyright --pythonpath $(BIN)/python $(ARGS)

# Several at a time: a program spends much of its time compiling, on one core.
figures: $(INSTALLED)
	@$(if $(SIMS),,echo "sims/ holds no simulation.")
	@$(MAKE) --no-print-directory --jobs=$(WORKERS) $(SIMS)

notebooks: $(INSTALLED)-notebooks
	@$(if $(NOTEBOOKS),,echo "notebooks/ holds no notebook.")
	@$(MAKE) --no-print-directory --jobs=$(WORKERS) $(NOTEBOOKS)

# In small they compute for moments and compile for seconds, as notebooks do.
$(SIMS):
	@echo "$@"
	@$(BRIEF) $(ALONE) $(BIN)/python $@ --profile quick $(ARGS)

$(NOTEBOOKS):
	@$(BRIEF) $(ALONE) $(BIN)/python notebooks/_execute.py $@ out/notebooks

# Verdicts, figures and notebooks of out/ become part of it, where they are there.
docs: $(INSTALLED)-docs
	@$(GUARDED) $(BIN)/python -m sphinx -E -a -W -n --keep-going -q -b html docs out/site $(ARGS)
	@$(BIN)/python docs/_ext/links.py out/site

benchmarks: $(INSTALLED)-benchmark
	@$(if $(BENCHMARKS),,echo "benchmarks/ holds no benchmark.")
	@set -e; for file in $(BENCHMARKS); do echo "$$file"; $(GUARDED) $(BIN)/python -m benchmarks $$(basename $$file .py) $(ARGS); done

mutants: $(INSTALLED)-test
	@$(BIN)/python -m benchmarks mutants $(ARGS)

# The wheel is built from the sdist, and tried in an environment of its own outside of this folder.
release: $(INSTALLED)-lock
	@rm -rf dist
	@$(BIN)/uv build --quiet --out-dir dist
	@PYTHON=$(abspath $(BIN)/python) .ci/try-wheel dist/*.whl
	@ls -l dist

constraints: $(INSTALLED)-lock
	@{ echo "# Made by 'make constraints': the releases that this repository is tested with."; \
	   $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --upgrade \
	     --no-header --no-annotate pyproject.toml; \
	 } > constraints.new
	@mv constraints.new constraints.txt

clean:
	rm -rf .venv .venv-* .cache .pytest_cache .ruff_cache out
