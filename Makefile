# `make demo` and `make test` need nothing but Python and the network: each makes the environment in .venv,
# and installs again only when PYTHON or the package's metadata has changed. `make test PYTHON=python3.12` picks another.

PYTHON ?= python3
WORKERS ?= 2

BIN := .venv/bin
# In the tests no window opens, and notebooks find the environment's own commands.
IN_ENV := PATH="$(CURDIR)/$(BIN):$$PATH" MPLBACKEND=Agg
# Notebooks and tests run side by side, so each keeps to one thread: more would fight over the cores.
NBDEV_TEST := $(IN_ENV) OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers $(WORKERS)
PYTEST := $(IN_ENV) $(BIN)/python -m pytest -n $(WORKERS)

define MAKE_ENV
@$(PYTHON) -c '' || { echo "'$(PYTHON)' does not run: name a Python, as in 'make PYTHON=python3.12'" >&2; exit 1; }; \
$(PYTHON) tools/make_env.py
endef

.PHONY: help demo test slow env dev readme docs docs-preview docs-test clean

help:
	@echo "make demo    pretrain a little with BYOL and show what comes of it"
	@echo "make test    all checks: notebooks and modules in sync, their tests, pytest, README in sync, the docs"
	@echo "make slow    the tests again, with the slow ones and the tutorials"
	@echo "make dev     only make the environment, for work on fastbyol"
	@echo "make readme  write README.md from nbs/index.ipynb, and nbs/llms.txt"
	@echo "make docs    build the web pages in _docs, with Quarto if it is there; docs-preview: without it"
	@echo "make docs-test  build them without Quarto, check them, and look at each in Chromium"
	@echo "make clean   remove what builds and docs leave behind"

demo: env
	$(BIN)/fastbyol-demo

test: dev
	$(BIN)/python tools/check_sync.py
	$(BIN)/python tools/make_readme.py --check
	$(MAKE) docs-test
	$(NBDEV_TEST) --skip-folder-re '^([._]|tutorials)'
	$(PYTEST)

slow: dev
	$(NBDEV_TEST) --flags slow --cell-timeout 0
	$(PYTEST) --runslow

env:
	$(MAKE_ENV)

dev:
	$(MAKE_ENV) dev

readme: dev
	$(BIN)/python tools/make_readme.py

# the published site is Quarto's; the preview has its addresses and anchors, and needs nothing but Python
docs: dev
	@if command -v quarto >/dev/null; then $(IN_ENV) $(BIN)/nbdev-docs; else $(IN_ENV) $(BIN)/python tools/make_docs.py; fi

docs-preview: dev
	$(IN_ENV) $(BIN)/python tools/make_docs.py

docs-test: docs-preview
	tools/ensure_chromium.sh
	$(BIN)/python tools/check_docs.py

clean:
	rm -rf build dist *.egg-info _proc _docs .pytest_cache
