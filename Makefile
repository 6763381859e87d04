# Two commands for a fresh machine: `make demo` and `make test`. Everything else is for developers.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
TORCH = torch==2.13.0
# pytest workers of one thread, three for two cores: many tests wait for processes of their own. Each file is one
# worker's, in the order of tests/conftest.py. Bytecode is kept whatever the environment says: many processes import
# the package.
WORKERS ?= 3
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all types fuzz wheel-test docs page lint format example clean

# A file that says: installed since the pins or the package's metadata last changed.
$(VENV)/installed: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[all,test]" -c constraints.txt
	touch $@

demo: $(VENV)/installed
	$(BIN)/fleetflow demo

test: $(VENV)/installed lint
	$(PYTEST)

# Also what takes minutes: all networks captured and exported, every solver of every reference output.
test-all: $(VENV)/installed lint types
	FLEETFLOW_SLOW=1 $(PYTEST)

# The types of the package, in basic mode ([tool.pyright] in pyproject.toml).
types: $(VENV)/installed
	$(BIN)/python -m basedpyright --level error --pythonpath $(BIN)/python --project .

# Damaged files for every reader, an hour long and from another seed each time; `make test` has seed 0.
fuzz: $(VENV)/installed
	FLEETFLOW_FUZZ_SECONDS=$${FLEETFLOW_FUZZ_SECONDS:-3600} FLEETFLOW_FUZZ_SEED=$${FLEETFLOW_FUZZ_SEED:-$$(date +%s)} \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s tests/test_io_fuzz.py

# The wheel alone, without extras, in a new environment and away from the repository: it predicts its example.
wheel-test: $(VENV)/installed
	rm -rf dist/wheel && $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w dist/wheel .
	sh tests/wheel.sh dist/wheel $(TORCH)

# The site, into docs/_build; a link that leads nowhere fails.
docs: $(VENV)/installed
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build

# The static page into page/dist, for any web host; needs npm.
page: $(VENV)/installed
	$(BIN)/python page/build.py

lint: $(VENV)/installed
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks

format: $(VENV)/installed
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

# Renders the example pair of the package anew (the same bytes on the same version of torch).
example: $(VENV)/installed
	$(BIN)/python benchmarks/render_example.py

clean:
	rm -rf $(VENV) runs demo dist docs/_build page/dist page/node_modules .pytest_cache .ruff_cache .hypothesis
