# Needs python3 and make on the machine, nothing else: everything is set up in $(VENV).
#
#   PYTHON       the interpreter the virtual environment is made with
#   VENV         where the virtual environment goes
#   TORCH_INDEX  a package index to take torch from besides pip's own; PyTorch's CPU builds, where
#                there is no NVIDIA driver, because on Linux PyPI's torch brings CUDA along
#   FUSED_SAM_BUILD  which native libraries are built: auto, none, cpu or cuda (see setup.py)
#   ARGS         passed on to the demo, to pytest, or to the benchmarks
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,https://download.pytorch.org/whl/cpu)
ARGS ?=
# The environment with the frameworks, in the versions of constraints-frameworks.txt.
FRAMEWORKS_VENV ?= .venv-frameworks
FRAMEWORKS := lightning transformers accelerate timm fastai pytorch-ignite skorch peft

BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Without build isolation: an isolated build environment would get a torch of its own.
INSTALL := $(PIP) install --no-build-isolation --constraint $(VENV)/constraints.txt
FRAMEWORKS_INSTALL := $(FRAMEWORKS_VENV)/bin/python -m pip --disable-pip-version-check install \
	--constraint constraints-frameworks.txt
CSRC := $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)

# True where the interpreter comes with a torch that has a GPU: that one is used, not the pinned
# one, which may be built for another driver.
HAS_GPU_TORCH := $(PYTHON) -c 'import sys, torch; sys.exit(not (torch.cuda.is_available() \
	and torch.__version__ >= torch.torch_version.TorchVersion("2.10") \
	and sys.prefix == sys.base_prefix))' 2>/dev/null

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-long test-frameworks bench bench-quick bench-report check format clean distclean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile

demo: $(VENV)/.demo ## train with SGD and with SAM on real data, print a table, write a picture
	$(BIN)/python -m fused_sam.demo $(ARGS)

test: $(VENV)/.dev ## run the tests; fails under 95 % coverage by lines and branches
	$(PYTEST) -m "not long" --cov $(ARGS)

test-long: $(VENV)/.dev ## the rest: machine code, sanitizers, an exception at every line, long sequences
	$(PYTEST) -m long $(ARGS)

test-frameworks: $(FRAMEWORKS_VENV)/.ready ## test the adapters with the real Lightning, transformers, ...; CPU
	PYTHONPATH=. $(FRAMEWORKS_VENV)/bin/python -m pytest -c tests/frameworks/pytest.ini \
		tests/frameworks $(ARGS)

bench: $(VENV)/.bench ## measure against the peers, under 15 minutes; writes docs/benchmarks.md
	$(BIN)/python -m bench --keep $(ARGS)

bench-quick: $(VENV)/.bench ## the same in under 2 minutes: a smoke test, not to be published
	$(BIN)/python -m bench --quick $(ARGS)

bench-report: $(VENV)/.bench ## write docs/benchmarks.md and README's section from the last results
	$(BIN)/python -m bench.report bench/results/cpu.json

check: $(VENV)/.dev ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(if $(CSRC),$(BIN)/clang-format --dry-run -Werror $(CSRC))

format: $(VENV)/.dev ## put style and format right
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(if $(CSRC),$(BIN)/clang-format -i $(CSRC))

clean: ## remove build outputs and caches
	rm -rf build dist *.egg-info fused_sam/*.so .coverage .coverage.* htmlcov
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' \
		-not -path './$(FRAMEWORKS_VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environments too
	rm -rf $(VENV) $(FRAMEWORKS_VENV)

# Set-up, in steps. A step's stamp goes first and comes back last, so a step that failed is taken
# again.

$(VENV)/.created:
	@rm -f $@
	if $(HAS_GPU_TORCH); then \
		$(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
		$(PYTHON) -m venv $(VENV); \
	fi
	touch $@

$(VENV)/.torch: $(VENV)/.created constraints.txt
	@rm -f $@
	if grep -q 'system-site-packages = true' $(VENV)/pyvenv.cfg; then \
		grep -vE '^(torch|triton)==' constraints.txt > $(VENV)/constraints.txt; \
	else \
		cp constraints.txt $(VENV)/constraints.txt; \
	fi
	$(PIP) install --constraint $(VENV)/constraints.txt setuptools wheel ninja
	$(INSTALL) $(if $(TORCH_INDEX),--retries 2 --extra-index-url $(TORCH_INDEX)) torch
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml setup.py $(CSRC)
	@rm -f $@
	$(INSTALL) --editable '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml setup.py $(CSRC)
	@rm -f $@
	$(INSTALL) --editable '.[demo,dev,triton]'
	touch $@

# The package itself is not installed here: it is taken as it is, with the native library that
# $(VENV) has built, if any.
$(FRAMEWORKS_VENV)/.ready: constraints-frameworks.txt
	@rm -f $@
	$(PYTHON) -m venv $(FRAMEWORKS_VENV)
	$(FRAMEWORKS_INSTALL) $(if $(TORCH_INDEX),--retries 2 --extra-index-url $(TORCH_INDEX)) \
		torch torchvision
	$(FRAMEWORKS_INSTALL) $(FRAMEWORKS) pytest
	touch $@

$(VENV)/.bench: $(VENV)/.torch pyproject.toml setup.py $(CSRC)
	@rm -f $@
	$(INSTALL) --editable '.[bench]'
	touch $@
