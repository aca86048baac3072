# train, test, check, slow, bench, gpu, results, docs: each sets up its own environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= train,sweeps,tensorboard,word2vec,spacy,onnx,report,dev
RUNS ?= runs

.PHONY: setup train test slow check bench gpu results docs

# One stamp a set of requirements: a second call finds it and installs nothing.
STAMP := $(VENV)/installed-$(EXTRAS)
setup: $(STAMP)
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 to 3.13 is needed, this is %d.%d: make PYTHON=python3.11" % sys.version_info[:2] if not (3, 11) <= sys.version_info[:2] < (3, 14) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

train: setup
	$(BIN)/python train.py $(ARGS)

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

slow: setup
	$(BIN)/python -m pytest -m slow $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python scripts/benchmark.py all

gpu: setup
	$(BIN)/python -m pytest -m gpu $(ARGS)

results: setup
	$(BIN)/python scripts/results.py $(RUNS) --png $(RUNS)/curves.png

docs:
	$(MAKE) setup EXTRAS=docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
