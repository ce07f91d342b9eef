# `make serve` and `make test` do all their own setting up; `make setup` does that alone.

PYTHON ?= python3
BIN := .venv/bin
EXAMPLES := vowels sunspots sunspots-jordan characters
# What builds and runs images; another engine with the same verbs will do.
DOCKER ?= docker

.PHONY: setup serve test test-long check servers lock bench gpu-references gpu-test container-test
.DELETE_ON_ERROR:

serve: setup
	exec $(BIN)/cellserve serve

setup: $(BIN)/.all $(EXAMPLES:%=artifacts/%/1/model.onnx)

test: $(BIN)/.dev $(BIN)/.silero setup check servers
	$(BIN)/pytest -n auto --dist worksteal

# The campaigns: minutes of kills, of fuzzing, and the container where there is an engine to run it.
test-long: $(BIN)/.dev $(BIN)/.silero setup servers
	$(BIN)/pytest -m long -n 0
	@if $(DOCKER) info >/dev/null 2>&1; then $(MAKE) container-test; \
	else echo "no container was built: '$(DOCKER) info' finds no engine here, give another with DOCKER=..."; fi

# The tests run a real Redis and a real load balancer, watch what a server asks of the system, and build the bench's
# load generator.
servers:
	@for program in redis-server strace nginx cc; do \
		PATH=$$PATH:/usr/sbin command -v $$program >/dev/null || missing=yes; \
	done; \
	test -z "$$missing" || { apt-get update -q \
	&& apt-get install -qy --no-install-recommends redis-server nginx-light strace gcc libc6-dev; }

check: $(BIN)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	UV=$(BIN)/uv sh requirements/lock.sh --check

# Writes the pinned versions anew, kept where they still fit; `make lock UPGRADE=1` takes the newest that do.
lock: $(BIN)/.dev
	UV=$(BIN)/uv sh requirements/lock.sh $(UPGRADE:%=--upgrade)

# Measures Cellserve beside what else there is and prints the table, within ten minutes.
bench: $(BIN)/.dev .venv-triton/.done servers
	$(BIN)/python -m bench --json bench.json

# Triton is a peer of the bench alone; where it cannot be had, its rows say so.
.venv-triton/.done: requirements/triton.txt | $(BIN)/python
	-$(BIN)/uv venv -q --clear .venv-triton --python $(BIN)/python \
	&& $(BIN)/uv pip install -q --no-deps --python .venv-triton/bin/python -r $< && touch $@

# What the tests for a GPU compare with: made where TensorFlow is, carried to where a GPU is.
gpu-references: setup
	rm -rf $@
	$(BIN)/python -m tests.gpu.prepare $@

# The tests for a GPU, in an environment of their own or with GPU_PYTHON=python3 in what is there: docs/gpu.md.
GPU_PYTHON ?= .venv-gpu/bin/python
gpu-test: $(if $(filter .venv-gpu/%,$(GPU_PYTHON)),.venv-gpu/.done)
	$(GPU_PYTHON) -m pytest tests/gpu $(GPU_FLAGS)

.venv-gpu/.done: requirements/gpu.txt pyproject.toml | $(BIN)/python
	test -x .venv-gpu/bin/python || $(BIN)/python -m venv .venv-gpu
	$(call install_to,.venv-gpu,-r $<)
	$(call install_to,.venv-gpu,-c requirements/dev.txt pytest)
	$(call install_to,.venv-gpu,--no-deps -e .)
	touch $@

# Builds the image and sees it serve, as another user, on a read-only file system.
container-test:
	DOCKER="$(DOCKER)" sh tests/container.sh

# A model that is there stays: its versions are never changed.
artifacts/%/1/model.onnx: | $(BIN)/.all
	$(BIN)/cellserve train $*
	$(BIN)/cellserve export trained/$*.keras --name $* --version 1

# Debian's Python comes without the half of venv that brings pip. uv installs in seconds what pip takes minutes for;
# where it is not to be had, pip does it.
$(BIN)/python:
	$(PYTHON) -m venv .venv 2>/dev/null \
	|| { rm -rf .venv; $(PYTHON) -m pip install -q virtualenv && $(PYTHON) -m virtualenv -q .venv; } \
	|| { rm -rf .venv; apt-get update -q && apt-get install -qy python3-venv && $(PYTHON) -m venv .venv; }
	$(BIN)/python -m pip install -q --disable-pip-version-check 'uv>=0.9,<1' || echo "uv is not to be had: pip installs"

install_to = if test -x $(BIN)/uv; then $(BIN)/uv pip install -q --python $(1)/bin/python $(2); \
	else $(1)/bin/python -m pip install -q --disable-pip-version-check $(2); fi
install = $(call install_to,.venv,$(1))

# $(BIN)/.all and $(BIN)/.dev note that what stands in requirements/ under that name is installed.
$(BIN)/.%: requirements/%.txt pyproject.toml | $(BIN)/python
	$(call install,-r $<)
	$(call install,--no-deps -e .)
	touch $@

# The tests adopt Silero VAD: its package's files alone, without PyTorch, which it would bring.
$(BIN)/.silero: requirements/silero.txt | $(BIN)/.dev
	$(call install,--no-deps -r $<)
	touch $@
