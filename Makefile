# Every target works in a fresh clone: it makes .venv first, and installs nothing the second time.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lab bench gallery

quickstart: .venv/installed  ## generate networks that classify handwritten digits, and look at them
	$(BIN)/pdiff run 00_quickstart

# A file or a notebook per core at a time, each whole on one worker, which keeps to its core; one more for the tests (tests/conftest.py).
WORKERS := --numprocesses=logical --maxprocesses=4 --dist=loadfile
test: export OMP_NUM_THREADS := 1
test: .venv/installed  ## unit tests and doctests; every notebook under papermill and nbval
	$(BIN)/python -m pytest $(WORKERS) --durations=40 --no-loadscope-reorder -m "not alone"
	$(BIN)/python -m pytest -m alone $$(grep -rl 'mark[.]alone' tests --include='test_*.py')
	PDIFF_SVG=0 $(BIN)/python -m pytest $(WORKERS) -p tests.warm --nbval-lax --nbval-cell-timeout=600 notebooks

lab: .venv/installed  ## explore in the browser
	$(BIN)/jupyter lab --notebook-dir=notebooks

bench: .venv/installed  ## ratios against the plain way
	for b in tests/benchmarks/bench_*.py; do $(BIN)/python $$b || exit 1; done

gallery: .venv/installed  ## tables of the READMEs, from what figures/ holds
	$(BIN)/python figures/gallery.py

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test,cluster,shapes,vision]'
	touch $@
