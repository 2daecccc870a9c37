# make demo | pair | test | test-slow | bench | lint | docs | verify, each from a machine that has only Python (3.11 or
# newer) and make.
# PIP_OPTIONS is handed to pip. On Linux, torch's CPU build saves gigabytes:
#   make demo PIP_OPTIONS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
PIP_OPTIONS ?=
BIN := .venv/bin
INSTALLED := .venv/installed
NVIDIA := .venv-nvidia
WORKERS ?= 2

.PHONY: demo pair test test-slow bench lint docs verify clean

demo: $(INSTALLED)
	$(BIN)/python -m tests.demo

# Trains demo/*.pth anew, about an hour (demo/README.md).
pair: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[pair]'
	$(BIN)/python demo/make_pair.py

test: $(INSTALLED) $(NVIDIA)/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=20

test-slow: $(INSTALLED) $(NVIDIA)/installed $(NVIDIA)/cudnn/installed .venv-tortoise/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[pair,transcribe,evaluate]'
	PYTHONPATH=$(CURDIR)/$(NVIDIA):$(CURDIR)/$(NVIDIA)/cudnn $(BIN)/python -m pytest -m slow --timeout 7200 -o faulthandler_timeout=0

# An hour or more, 16 GB of memory and 8 GB of disk; benchmarks/plan_table.py needs the compilers of '.[plan]' too.
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.train --size tiny
	$(BIN)/python -m benchmarks.train --layers 4
	$(BIN)/python -m benchmarks.recipe --layers 4
	$(BIN)/python -m benchmarks.generate --size tiny
	$(BIN)/python -m benchmarks.generate
	$(BIN)/python -m benchmarks.synthesis
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
	$(TORTOISE)/bin/python -m pip install --quiet $(PIP_OPTIONS) $$(grep ^torch== constraints.txt) numpy einops rotary_embedding_torch \
	  'transformers==4.31.0'
	$(TORTOISE)/bin/python -m pip install --quiet --no-deps tortoise-tts
	touch $@

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(PIP_OPTIONS) --editable '.[test]'
	touch $@

# NVIDIA's compiler, 220 MB to download, in a folder of its own: JAX would load it in every process, and each then says
# that there is no card. cuDNN, 700 MB, is for one value of config.attention.
ON_LINUX := ; platform_system == "Linux" and platform_machine == "x86_64"
INTO := $(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt --target
$(NVIDIA)/installed: constraints.txt | $(INSTALLED)
	rm -rf $(NVIDIA) && mkdir $(NVIDIA)
	$(INTO) $(NVIDIA) 'jax-cuda12-plugin $(ON_LINUX)' 'jax-cuda12-pjrt $(ON_LINUX)' 'nvidia-cuda-nvcc-cu12 $(ON_LINUX)'
	touch $@

$(NVIDIA)/cudnn/installed: $(NVIDIA)/installed
	$(INTO) $(NVIDIA)/cudnn 'nvidia-cudnn-cu12 $(ON_LINUX)'
	touch $@

clean:
	rm -rf .venv .venv-nvidia .venv-tortoise demo-output docs-output verify-output
