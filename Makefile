# Every target makes what it needs, with nothing but Python 3.11 (or later) and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUNTIME := $(HOME)/.cache/qmesh/runtime

.PHONY: demo test system check bench fuzz sim lock clean

demo: $(READY)
	@$(BIN)/python -m examples.demo

test: $(READY)
	@$(BIN)/pytest -q -n 4 --dist loadgroup

# As root on Debian, with the packages that .ci/run installs: several hosts in network namespaces, the
# JavaScript client, and the sidecar's tests on a llama-server that `runtime build` made.
system: $(READY)
	@$(BIN)/pytest -q -n 2 tests/netns tests/system
	@server=$$($(BIN)/qmesh-node runtime build --runtime-dir $(RUNTIME) --quiet --json | tail -n 1) && \
		QMESH_TEST_LLAMA_SERVER=$$(echo "$$server" | $(BIN)/python -c 'import json,sys; print(json.load(sys.stdin)["path"])') \
		$(BIN)/pytest -q -n 2 tests/integration/test_sidecar_real.py tests/integration/test_sidecar_engine.py \
		tests/integration/test_sidecar_pool.py

check: $(READY)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(READY)
	@$(BIN)/python -m benchmarks

sim: $(READY)
	@$(BIN)/python -m tests.sim

fuzz: $(READY)
	@QMESH_FUZZ_ROUNDS=1000000 $(BIN)/pytest -q tests/fuzz --timeout=0

lock: $(READY)
	@$(BIN)/pip install -q uv
	@$(BIN)/uv pip compile pyproject.toml --extra dev --extra embedded --universal --generate-hashes \
		--python-version 3.11 --no-emit-index-url --no-emit-find-links --no-header -q -o requirements.lock

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "QMesh needs Python 3.11 or later; name one with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up $(VENV) (once; a minute or two) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
