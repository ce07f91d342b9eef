# `make serve` and `make test` set up everything they need. `make setup` only sets up.

PYTHON ?= python3
BIN := .venv/bin
# Builds and runs images. Any engine with the same subcommands works (DOCKER=podman).
DOCKER ?= docker

# TensorFlow's import takes four times as long where Python may not keep what it compiled.
unexport PYTHONDONTWRITEBYTECODE

# `docs` is a folder too.
.PHONY: setup serve test pytest coverage test-long fuzz check docs release-check release-draft servers lock bench scale
.PHONY: gpu-references gpu-test container-test
.DELETE_ON_ERROR:

# Serves from the first model on, while the other examples are being made.
serve: $(BIN)/.all
	exec $(BIN)/cellserve examples --serve

setup: $(BIN)/.all
	$(BIN)/cellserve examples

# Half as many processes again as there are cores: tests wait for servers.
TEST_PROCESSES ?= $(shell echo $$(( ($$(nproc) * 3 + 1) / 2 )))
# mypy runs beside the tests: alone it would leave the other cores idle.
test: $(BIN)/.dev $(BIN)/.silero setup servers
	$(MAKE) -j2 check pytest

# COVERAGE=yes counts the branches that all of them take, in servers too, for twice the processor time on Python 3.11.
pytest:
	$(BIN)/pytest -n $(TEST_PROCESSES) --dist worksteal --ignore tests/hostile $(COVERAGE:%=--cov)

# The branches that the tests without a server take: a minute or two, for CI's log.
coverage: $(BIN)/.dev setup servers
	$(BIN)/pytest -q -n $(TEST_PROCESSES) --cov=service --cov=cellserve tests/service tests/cellserve

# The long tests: minutes of kills, exports and fuzzing; the attacks, which measure, alone; then the image's test if an
# engine is available.
test-long: $(BIN)/.dev $(BIN)/.silero setup servers
	$(BIN)/pytest -m long -n $(shell nproc) --dist worksteal --ignore tests/hostile
	$(BIN)/pytest -m long -n 0 tests/hostile
	@if $(DOCKER) info >/dev/null 2>&1; then $(MAKE) container-test; \
	else echo "no container was built: '$(DOCKER) info' finds no engine here; name another with DOCKER=..."; fi

# Exports random networks and compares them with Keras; wrong ones are saved in fuzz/.
fuzz: $(BIN)/.dev
	$(BIN)/python -m tests.export.fuzz $(FUZZ_FLAGS)

# Installs what the tests run: a real Redis, a real load balancer, a real browser, strace, curl and Node for the
# snippets of the docs, and a C compiler for the bench's load generator.
servers:
	@for program in redis-server strace nginx cc chromium curl node; do \
		PATH=$$PATH:/usr/sbin command -v $$program >/dev/null || missing=yes; \
	done; \
	test -z "$$missing" || { apt-get update -q \
	&& apt-get install -qy --no-install-recommends redis-server nginx-light strace gcc libc6-dev chromium curl nodejs node-ws; }

check: $(BIN)/.dev docs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/unasync.py --check
	UV=$(BIN)/uv sh requirements/lock.sh --check

# Writes the pinned versions. Those that still fit are kept; `make lock UPGRADE=1` takes the newest.
lock: $(BIN)/.dev
	UV=$(BIN)/uv sh requirements/lock.sh $(UPGRADE:%=--upgrade)

# Builds the site of docs/ in site/, and fails for a link that leads nowhere.
docs: $(BIN)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# What would be published, built in dist/ and checked. RELEASE_FLAGS=--unreleased: the changelog may have no date yet.
release-check: $(BIN)/.release
	$(BIN)/python scripts/release_check.py $(RELEASE_FLAGS)

# A draft of the release TAG with what `release-check` built. A person publishes it.
release-draft:
	gh release create $(TAG) --draft --verify-tag --notes-from-tag dist/*

# Measures Cellserve beside other servers and prints the table, within ten minutes.
bench: $(BIN)/.dev .venv-triton/.done servers
	$(BIN)/python -m bench --json bench.json

# Writes the table of docs/explanation/scale.md and draws its plots. SCALE_FLAGS=--measure measures the costs that they
# come from; --check compares the model with two replicas and a Redis on this machine.
scale: $(BIN)/.dev servers
	$(BIN)/python -m bench.scale $(SCALE_FLAGS)

# Only the bench needs Triton. If it cannot be installed, its rows say so.
.venv-triton/.done: requirements/triton.txt | $(BIN)/python
	-$(BIN)/uv venv -q --clear .venv-triton --python $(BIN)/python \
	&& $(BIN)/uv pip install -q --no-deps --python .venv-triton/bin/python -r $< && touch $@

# References for the GPU tests: made on a machine with TensorFlow, then copied to the machine with the GPU.
gpu-references: setup
	rm -rf $@
	$(BIN)/python -m tests.gpu.prepare $@

# The GPU tests, in an environment of their own, or with GPU_PYTHON=python3 in an existing one: docs/how-to/gpu.md.
GPU_PYTHON ?= .venv-gpu/bin/python
gpu-test: $(if $(filter .venv-gpu/%,$(GPU_PYTHON)),.venv-gpu/.done)
	$(GPU_PYTHON) -m pytest tests/gpu $(GPU_FLAGS)

.venv-gpu/.done: requirements/gpu.txt pyproject.toml | $(BIN)/python
	test -x .venv-gpu/bin/python || $(BIN)/python -m venv .venv-gpu
	$(call install_to,.venv-gpu,-r $<)
	$(call install_to,.venv-gpu,-c requirements/dev.txt pytest)
	$(call install_to,.venv-gpu,--no-deps -e .)
	touch $@

# Builds the image and checks that it serves, as another user, on a read-only file system. BUILD_FLAGS are options of
# each build, such as --build-arg BASE=MIRROR/python:3.12-slim.
container-test: $(BIN)/.dev
	DOCKER="$(DOCKER)" sh tests/container.sh $(BUILD_FLAGS)
	ENGINE="$(DOCKER)" BUILD_FLAGS="$(BUILD_FLAGS)" $(BIN)/pytest -m container -n 0 tests/docs

# Debian's Python lacks the part of venv that installs pip. uv installs in seconds what takes pip minutes; pip is the
# fallback.
$(BIN)/python:
	$(PYTHON) -m venv .venv 2>/dev/null \
	|| { rm -rf .venv; $(PYTHON) -m pip install -q virtualenv && $(PYTHON) -m virtualenv -q .venv; } \
	|| { rm -rf .venv; apt-get update -q && apt-get install -qy python3-venv && $(PYTHON) -m venv .venv; }
	$(BIN)/python -m pip install -q --disable-pip-version-check 'uv>=0.9,<1' || echo "uv is not available: installing with pip"

install_to = if test -x $(BIN)/uv; then $(BIN)/uv pip install --python $(1)/bin/python $(2); \
	else $(1)/bin/python -m pip install --disable-pip-version-check $(2); fi
install = $(call install_to,.venv,$(1))

# $(BIN)/.all and $(BIN)/.dev are stamps: the file of that name in requirements/ is installed.
$(BIN)/.%: requirements/%.txt pyproject.toml | $(BIN)/python
	$(call install,-r $<)
	$(call install,--no-deps -e .)
	touch $@

# The tests adopt Silero VAD. --no-deps takes the package's files without PyTorch.
$(BIN)/.silero: requirements/silero.txt | $(BIN)/.dev
	$(call install,--no-deps -r $<)
	touch $@
