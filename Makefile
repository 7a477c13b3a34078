# Plain pip and GNU make. Needs Python 3.11 or newer, nothing else; everything goes into .venv.
#   make test PYTHON=python3.12     another Python for the virtual environment
#   make bench ARGS='--full --json bench.json'     options for python -m benchmarks; also --accelerator
#   make test PY=python             a Python that has everything already: nothing is created or installed
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo     PyTorch without CUDA: a smaller download
PYTHON ?= python3

ifdef PY
  DEMO_READY :=
  DEV_READY :=
  BENCH_READY :=
else
  PY := .venv/bin/python
  # Stamps inside the environment: it is installed again only after pyproject.toml changed, or .venv was removed.
  DEMO_READY := .venv/.installed-demo
  DEV_READY := .venv/.installed-dev
  BENCH_READY := .venv/.installed-bench
endif

.DEFAULT_GOAL := help
.PHONY: help install demo test test-lowest test-slow test-faults bench lint clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

install: $(DEV_READY) ## create .venv and install maekit with the tools for tests and type checks

demo: $(DEMO_READY) ## from a fresh machine: install, pretrain and evaluate on bundled data
	@$(PY) -m maekit demo

# One process a core, up to four: each takes a gigabyte, and whole files of tests, as their runs are made once a file.
test: $(DEV_READY) ## every test that needs no GPU and no network
	@$(PY) -m pytest -n logical --maxprocesses 4 --dist loadfile

test-lowest: .venv-lowest/.installed ## the same with the oldest versions that pyproject.toml allows
	@.venv-lowest/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile

test-slow: $(DEV_READY) ## the longer proofs
	@$(PY) -m pytest -m slow

test-faults: $(DEV_READY) ## kill, stop and damage runs hundreds of times; prints promise, faults tried, losses
	@$(PY) tests/faults

bench: $(BENCH_READY) ## speed and memory beside others' code, in one table; wants a quiet machine
	@$(PY) -m benchmarks $(ARGS)

lint: $(DEV_READY) ## ruff and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

clean: ## remove caches and build outputs; runs/ and the environments stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find maekit tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "maekit needs Python 3.11 or newer, but $(PYTHON) is `$(PYTHON) --version 2>&1`: name another one, such as PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { \
	  echo "$(PYTHON) cannot make a virtual environment. On Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }

# pip's own progress bars vanish in a log and its 200 lines say little: show the large downloads and the unpacking.
# A pipe hides pip's exit status, so the stamp tells whether it succeeded. Errors come on stderr, untouched.
define pip_install
	@echo "installing maekit[$(1)] into .venv: about 3 minutes the first time, mostly PyTorch"
	@rm -f $@
	@{ .venv/bin/python -m pip install --disable-pip-version-check -e '.[$(1)]' && touch $@; } | while IFS= read -r line; do \
	  case "$$line" in \
	    *Downloading*[0-9][0-9].[0-9]" MB)"*|*Downloading*" GB)"*) \
	      name=$${line#*Downloading }; echo "  downloading $${name%%-*} ($${line##*\(}" ;; \
	    "Installing collected packages"*) echo "  unpacking" ;; \
	  esac; \
	done
	@test -e $@
endef

.venv/.installed-demo: pyproject.toml | .venv/bin/pip
	$(call pip_install,demo)

.venv/.installed-bench: pyproject.toml | .venv/bin/pip
	$(call pip_install,bench)

.venv/.installed-dev: pyproject.toml | .venv/bin/pip
	$(call pip_install,dev)
	@touch .venv/.installed-demo

# pip takes the newest version that it may; uv can be told to take the oldest.
.venv-lowest/.installed: pyproject.toml
	@$(PYTHON) -m venv .venv-lowest
	@.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check uv
	@.venv-lowest/bin/uv pip install --python .venv-lowest/bin/python --resolution lowest-direct -e '.[dev,hub]'
	@touch $@
