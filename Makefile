# Every target makes its own environment in .venv; nothing else needs to be installed.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: help demo test test-fast test-lowest check lint bench dist clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/ready  ## make a small zoo, merge it in five ways, print one table (about three minutes)
	$(BIN)/hf-epimer demo

test: check  ## the style, the types and every test
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: check  ## the style, the types and the tests that take about a minute together
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile

test-lowest: .venv-lowest/ready  ## the fast tests with the lowest versions that pyproject.toml allows
	OMP_WAIT_POLICY=PASSIVE .venv-lowest/bin/python -m pytest -m 'not slow' --ignore tests/space --ignore tests/docs

check: .venv/ready  ## the style and the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy hf_epimer spaces_app scripts

lint: .venv/ready  ## put the style right where that can be done by a program
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/ready  ## time the merge on ViT-B/32-sized checkpoints (6 GB in the temporary folder)
	$(BIN)/python scripts/bench_merge.py

dist: .venv/ready  ## build what PyPI gets into dist/, and check it
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:  ## remove the environment and everything the tools left
	rm -rf .venv .venv-lowest dist .pytest_cache .ruff_cache .mypy_cache .hypothesis

.venv/ready: pyproject.toml constraints.txt
	command -v $(PYTHON) >/dev/null && $(PYTHON) -m venv .venv || python3 -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch .venv/ready

.venv-lowest/ready: pyproject.toml constraints-lowest.txt
	command -v $(PYTHON) >/dev/null && $(PYTHON) -m venv .venv-lowest || python3 -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet --disable-pip-version-check -c constraints-lowest.txt -e '.[test]'
	touch .venv-lowest/ready
