# make demo | pair | test | test-slow | bench | lint | docs | verify, each from a machine that has only Python (3.11 or
# newer) and make.
# PIP_OPTIONS is handed to pip. On Linux, torch's CPU build saves gigabytes:
#   make demo PIP_OPTIONS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
PIP_OPTIONS ?=
BIN := .venv/bin
INSTALLED := .venv/installed
WORKERS ?= 2

.PHONY: demo pair test test-slow bench lint docs verify clean

demo: $(INSTALLED)
	$(BIN)/python -m tests.demo

# Trains demo/*.pth anew, an hour or two (demo/README.md).
pair: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[pair]'
	$(BIN)/python demo/make_pair.py

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=20

test-slow: $(INSTALLED) .venv-tortoise/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[plan,pair,transcribe,evaluate]'
	-$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt nvidia-cudnn-cu12  # to compile for
	$(BIN)/python -m pytest -m slow --timeout 7200 -o faulthandler_timeout=0; status=$$?; $(BIN)/python -m pip uninstall --quiet --yes jax-cuda12-plugin \
	  jax-cuda12-pjrt; exit $$status  # the plugin says in every process that there is no card; quick tests listen

# An hour or more, 16 GB of memory and 8 GB of disk; benchmarks/plan_table.py needs the compilers of '.[plan]' too.
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.train --size tiny
	$(BIN)/python -m benchmarks.train --layers 4
	$(BIN)/python -m benchmarks.generate --size tiny
	$(BIN)/python -m benchmarks.generate
	$(BIN)/python -m benchmarks.data_throughput
	$(BIN)/python -m benchmarks.copy_synthesis
	$(BIN)/python -m benchmarks.convert_real_size --folder bench-output

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A page of the Python API, docs-output/index.html.
docs: $(INSTALLED)
	$(BIN)/python -W error docs/build.py docs-output

# The whole way with the released files, 4.3 GB to download: VOICE=folder of recordings, as for prepare.
VOICE ?= examples/voice
TORTOISE := .venv-tortoise
verify: $(INSTALLED) $(TORTOISE)/installed
	$(BIN)/python -m convert.verify --voice $(VOICE) --tortoise $(TORTOISE)/bin/python

# tortoise-tts asks for an old transformers, so it has an environment of its own.
$(TORTOISE)/installed:
	$(PYTHON) -m venv $(TORTOISE)
	$(TORTOISE)/bin/python -m pip install --quiet $(PIP_OPTIONS) torch numpy einops rotary_embedding_torch \
	  'transformers==4.31.0'
	$(TORTOISE)/bin/python -m pip install --quiet --no-deps tortoise-tts
	touch $@

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(PIP_OPTIONS) --editable '.[test]'
	touch $@

clean:
	rm -rf .venv .venv-tortoise demo-output docs-output verify-output
