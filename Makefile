# train, test, check, slow, cluster, bench, gpu, results, docs, wheel: each sets up its own environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= train,sweeps,tensorboard,word2vec,spacy,onnx,report,dev
RUNS ?= runs

.PHONY: setup train test slow cluster check bench gpu results docs wheel

# One stamp a set of requirements: a second call finds it and installs nothing.
STAMP := $(VENV)/installed-$(EXTRAS)
setup: $(STAMP)
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 to 3.14 is needed, this is %d.%d: make PYTHON=python3.11" % sys.version_info[:2] if not (3, 11) <= sys.version_info[:2] < (3, 15) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

# make train: a first run, a new folder each time. make train ARGS='data=trec': any other.
FIRST := runs/lm/$(shell date +%Y-%m-%d_%H-%M-%S)
train: setup
ifneq ($(ARGS),)
	$(BIN)/python train.py $(ARGS)
else
	$(BIN)/python train.py task=lm logger=csv run_dir=$(FIRST)
	@echo; echo 'What it writes after "The ":'; echo
	@$(BIN)/python predict.py checkpoint=$(FIRST) prompt='The ' length=400 temperature=0.7
	@echo; $(BIN)/python scripts/results.py $(FIRST) --png $(FIRST)/curves.png > /dev/null
	@printf '%s\n' '' 'Next (in full: docs/quickstart.md):' \
	  '  source $(BIN)/activate' \
	  '  python train.py resume=$(FIRST) trainer.max_epochs=20    # train for longer' \
	  '  python evaluate.py checkpoint=$(FIRST)                   # the test again' \
	  '  python predict.py checkpoint=$(FIRST) prompt="A class "  # more text' \
	  '  python train.py task=lm model=lstm width=160 logger=csv             # an LSTM of that size' \
	  '  python scripts/results.py runs/ --png runs/curves.png               # compare'
endif

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

slow: setup
	$(BIN)/python -m pytest -m 'slow and not cluster' $(ARGS)

cluster: setup
	$(BIN)/python -m pytest -m cluster -rs $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --strict sru
	$(BIN)/codespell

wheel:
	.ci/wheel $(PYTHON)

bench: setup
	$(BIN)/python scripts/benchmark.py all

# make gpu VENV= takes the Python and the packages that are there: for a machine without a network.
gpu: $(if $(VENV),setup)
	$(if $(VENV),$(BIN)/python,$(PYTHON)) -m pytest -m gpu -rs $(ARGS)

results: setup
	$(BIN)/python scripts/results.py $(RUNS) --png $(RUNS)/curves.png

docs:
	$(MAKE) setup EXTRAS=docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
