# Everything here needs only make and Python 3.11 or newer. The first call of a target makes .venv and installs into it;
# later calls see from the stamp files in .venv that nothing changed in pyproject.toml, and start at once.
#
#   PYTHON=python3.12   the Python that .venv is made with
#   TORCH=cpu           a smaller torch: PyTorch's own build for that backend (cpu, cu130, xpu, auto, ...) rather than the
#                       default build, which on Linux brings several GB for NVIDIA cards. Goes with an empty .venv.
#   ARGS="-k split"     more arguments for demo and test

PYTHON ?= python3
TORCH ?=
ARGS ?=
COVERAGE ?= 90

BIN := .venv/bin
# Certificates of the system, not uv's own: behind a company's proxy only they are trusted.
export UV_SYSTEM_CERTS := 1
TESTS = $(BIN)/pytest -q -n 3 --dist loadfile $(ARGS)
MINIMUM := 3, 11

.PHONY: help demo test check docs benchmarks format clean
.DEFAULT_GOAL := help

help: ## say what there is (the default)
	@sed -n 's/^\([a-z]*\): .*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  make %-10s %s\n' "$$name" "$$text"; done
	@printf '\nNo NVIDIA card? Add TORCH=cpu to the first call: a much smaller download.\n'

demo: $(BIN)/.demo-is-installed ## train a classifier on real images, write its report (first call: installs)
	$(BIN)/topwork demo $(ARGS)

test: $(BIN)/.dev-is-installed ## run the tests but the slow ones (first call: installs)
	$(TESTS)

check: $(BIN)/.dev-is-installed ## style, types, layers, dependencies, then the tests with coverage: what CI runs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry .
	$(TESTS) --cov --cov-report=term --cov-fail-under=$(COVERAGE)

docs: $(BIN)/.docs-is-installed ## build the documentation site into site/, without warnings
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

benchmarks: $(BIN)/.benchmarks-is-installed ## compare with fastai, a plain loop and transformers; writes docs/benchmarks.md
	$(BIN)/python benchmarks/peers.py --write docs/benchmarks.md $(ARGS)

format: $(BIN)/.dev-is-installed ## repair what ruff can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and what the tools left behind
	rm -rf .venv build dist site .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -type d -name __pycache__ -prune -exec rm -rf {} +

# uv rather than pip: it resolves torch and torchvision together from one index, whatever pip is configured to find.
# At the end both are imported, because a torch and a torchvision that do not match install without a word.
$(BIN)/.%-is-installed: pyproject.toml $(BIN)/uv
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode $(if $(TORCH),--torch-backend $(TORCH)) --editable '.[$*]'
	@$(BIN)/python -c 'import torch, torchvision' || { \
		echo 'torch and torchvision do not fit together: run "make clean" and try again.' >&2; exit 1; }
	@touch $@

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= ($(MINIMUM)) else \
		"topwork needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9'
