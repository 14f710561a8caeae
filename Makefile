VENV := .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
OLDEST := .venv-oldest
EXTRAS := eval gguf onnx 4bit
FORGIVEN := -W ignore::DeprecationWarning -W ignore::ResourceWarning -W ignore::pytest.PytestUnraisableExceptionWarning
PIP := -m pip install --quiet --no-compile
CORE := extract gguf quantised export paired records hub doctor mistakes

# Chromium is brought while the rest is installed
MAKEFLAGS += --jobs=2

.PHONY: setup test test-oldest test-faults fuzz lint browser demo dependencies clean

setup: $(VENV)/installed

# modules are compiled when they are first imported, which of all that is installed few are;
# torch first, in the release that the tests ran with; `make setup TORCH=...` takes another build
# an older transformers than we take stands aside, for a test that results load there
$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) $(TORCH)
	$(BIN)/python $(PIP) -e '.[dev]'
	$(BIN)/python $(PIP) --no-warn-conflicts --target $(VENV)/oldest 'transformers==5.16.0'
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the tests look at the report in a real browser; where apt-get cannot bring it, they say what to install
browser:
	command -v chromedriver > /dev/null || { apt-get update -qq && apt-get install -yqq chromium chromium-driver; } > /dev/null || true

test: lint browser
	$(BIN)/python -m pytest -q -n 2

# make test-faults KILLS=1000 FAULTS=500 for a night
test-faults: setup
	KILLS=$(or $(KILLS),50) FAULTS=$(or $(FAULTS),25) SEED=$(or $(SEED),0) PYTHONPATH=tests $(BIN)/python tests/faults.py

# damaged and hostile files: `make fuzz N=100000`
fuzz: setup
	$(BIN)/python tests/fuzz.py $(or $(N),10000) --seed $(or $(SEED),0)

# the lower bounds of pyproject.toml, torch aside, of which the release above is taken: older ones without a GPU's libraries
# are in no package index but torch's own (`make test-oldest TORCH=...`); warnings of old releases are theirs
$(OLDEST)/installed: pyproject.toml tools/oldest.py
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python tools/oldest.py $(EXTRAS) > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python $(PIP) $(TORCH)
	$(OLDEST)/bin/python $(PIP) -c $(OLDEST)/constraints.txt -e '.[eval,gguf,onnx,4bit]' pytest
	touch $@

test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python -m pytest -q $(FORGIVEN) $(CORE:%=tests/test_%.py)

dependencies: setup
	$(BIN)/python tools/dependencies.py > docs/dependencies.md

demo: setup
	$(BIN)/compresso prune --config configs/demo.yaml --overwrite

clean:
	rm -rf $(VENV) $(OLDEST) runs build *.egg-info .mypy_cache .pytest_cache .ruff_cache
