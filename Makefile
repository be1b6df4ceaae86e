# make venv, make demo, make test: each works in a clean clone, and makes what it needs.
#
# PYTHON=python3.12   the interpreter to make the virtual environment from
# VENV=DIR            where it is, .venv by default
# NO_VENV=1           no virtual environment: PYTHON itself has torch and the other dependencies (a GPU machine with no
#                     network, say); this checkout is installed into it, editable, if it isn't yet
# PYTEST="-n 8 -k x"  more arguments for pytest

PYTHON ?= python3
VENV ?= .venv
PYTEST ?=

ifdef NO_VENV
run := $(PYTHON)
ready := here
else
run := $(VENV)/bin/python
ready := $(VENV)/.installed
endif

.PHONY: venv demo test here

venv: $(ready)

demo: $(ready)
	$(run) -m fa3 demo

test: $(ready)
	$(run) -m pytest tests/cpu tests/gpu $(PYTEST)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt setuptools
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[cu13,inspect,perf,test]'
	touch $@

# fa3 must be this checkout's, kernels and all
here:
	@$(PYTHON) -c 'import os, fa3.kernels; assert os.path.samefile(fa3.kernels.__path__[0], "kernels")' 2>/dev/null \
	|| $(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .
