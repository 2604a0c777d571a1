# Two commands do everything: `make book` builds the course, `make test` checks it.
PYTHON ?= python3
BIN := .venv/bin
# Threads that wait leave the cores to others.
export OMP_WAIT_POLICY ?= passive

.PHONY: book test large device notebooks release models data picture

book: .venv/installed  ## run every chapter and build the site, from nothing each time
	rm -rf _build
	$(BIN)/jupyter-book build . -n -W --keep-going
	@cat _build/seconds.txt
	@echo "Open file://$(CURDIR)/_build/html/index.html"

# Two tests at a time, each with one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test: .venv/installed  ## style, imports, types, tests, and whether notebooks/ is in step with book/
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy
	@$(PYTEST) --dist loadfile

large: .venv/installed  ## the tests that take long: every notebook, models of real size, the installed wheel
	@$(PYTEST) --dist worksteal -m large

device: .venv/installed  ## on a machine with a graphics card: its tests, and times and memory in 8 minutes
	$(BIN)/python benchmarks/device.py

notebooks: .venv/installed  ## make notebooks/ anew from book/, with the values of the last `make book`
	$(BIN)/python book/_ext/notebooks.py

release: .venv/installed  ## after `make book`: the site as a zip, each page as a PDF
	$(BIN)/python book/_ext/release.py

models: .venv/installed  ## train the checkpoints that ship, anew
	$(BIN)/python benchmarks/assets.py models

data: .venv/installed  ## make the bundled data anew
	$(BIN)/python benchmarks/assets.py data

picture: .venv/installed  ## draw the README's picture anew
	$(BIN)/python book/_assets/readme.py

# The stamp comes last, so an install that failed is done again.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[book,test]"
	@touch $@
