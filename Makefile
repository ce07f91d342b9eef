# `make serve` and `make test` do all their own setting up; `make setup` does that alone.

PYTHON ?= python3
BIN := .venv/bin
EXAMPLES := vowels sunspots sunspots-jordan characters
# What builds and runs images; another engine with the same verbs will do.
DOCKER ?= docker

.PHONY: setup serve test check servers bench container-test
.DELETE_ON_ERROR:

serve: setup
	exec $(BIN)/cellserve serve

setup: $(BIN)/.all $(EXAMPLES:%=artifacts/%/1/model.onnx)

test: $(BIN)/.dev $(BIN)/.silero setup check servers
	$(BIN)/pytest

# The tests adopt Silero VAD: its package's files alone, without PyTorch, which it would bring.
$(BIN)/.silero: | $(BIN)/.dev
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps 'silero-vad>=6.2,<6.3'
	touch $@

# The tests run a real Redis and a real load balancer.
servers:
	@command -v redis-server >/dev/null && { command -v nginx || test -x /usr/sbin/nginx; } >/dev/null \
	|| { apt-get update -q && apt-get install -qy --no-install-recommends redis-server nginx-light; }

check: $(BIN)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# Measures Cellserve beside what else there is and prints the table, within five minutes.
bench: $(BIN)/.bench servers
	$(BIN)/python -m bench --json bench.json

# Builds the image and sees it serve, as another user, on a read-only file system.
container-test:
	DOCKER="$(DOCKER)" sh tests/container.sh

# A model that is there stays: its versions are never changed.
artifacts/%/1/model.onnx: | $(BIN)/.all
	$(BIN)/cellserve train $*
	$(BIN)/cellserve export trained/$*.keras --name $* --version 1

# Debian's Python comes without the half of venv that brings pip.
$(BIN)/python:
	$(PYTHON) -m venv .venv 2>/dev/null \
	|| { rm -rf .venv; $(PYTHON) -m pip install -q virtualenv && $(PYTHON) -m virtualenv -q .venv; } \
	|| { rm -rf .venv; apt-get update -q && apt-get install -qy python3-venv && $(PYTHON) -m venv .venv; }

# $(BIN)/.all, $(BIN)/.dev and $(BIN)/.bench note that the extra of that name is installed.
$(BIN)/.%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[$*]'
	touch $@
