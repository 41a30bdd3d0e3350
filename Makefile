# make demo: set up, run the main job on the default model, write runs/demo/report.html
# make test: set up, then lint, types and tests
# make docs: set up, then the documentation site in site/, its notebooks executed; EXECUTE=no leaves out what was not executed before
# make compat: the tests of what differs with TransformerLens 3.9, on its HookedTransformer and on its bridge
# make bench: speed and memory beside other toolkits, each in an environment of its own under .bench/ (an hour or two); writes
#             benchmarks/RESULTS.md. THREADS=1 CLOCK=processor where the machine has other work
# make bench-quick: its ratios, in three minutes once the environments are there

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Test processes, of one thread each: more threads than cores make torch many times slower.
WORKERS ?= 2
READY := $(VENV)/.ready
COMPAT := $(CURDIR)/.compat
ON_3 = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=$(COMPAT) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: demo test docs compat bench bench-quick setup lint types unit clean

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "steerlens needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing pinned dependencies (a few minutes the first time) ..."
	$(PIP) $$(grep '^torch==' requirements.lock)
	$(PIP) --no-deps -r requirements.lock
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $(READY)

demo: $(READY)
	$(BIN)/steerlens run --out runs/demo --positions prompt --n-valid 6 --n-test 16 --search-tokens 96 --batch-size 256

test: lint types unit

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

unit: $(READY)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=15

$(COMPAT)/.ready: tests/compat/requirements.txt $(READY)
	rm -rf $(COMPAT)
	$(PIP) --no-deps --target $(COMPAT) -r tests/compat/requirements.txt
	@touch $@

compat: $(COMPAT)/.ready
	$(ON_3) -m 'not smollm2' tests/compat tests/models/test_load.py tests/models/test_passes.py
	$(ON_3) -m 'not smollm2 and not bridge' --hooked tests/models/test_passes.py tests/steering tests/vectors/test_activations.py tests/study/test_scores.py

BENCH = $(addprefix --threads ,$(THREADS)) $(addprefix --clock ,$(CLOCK))

bench: $(READY)
	$(BIN)/python -m benchmarks.peers.bench $(BENCH)

bench-quick: $(READY)
	$(BIN)/python -m benchmarks.peers.bench --quick $(BENCH)

clean:
	rm -rf $(VENV) $(COMPAT) .bench runs site .mypy_cache .pytest_cache .ruff_cache
