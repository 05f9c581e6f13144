# Every target sets up .venv when it is missing or older than its inputs, and does nothing twice.
PYTHON ?= python3
BIN := .venv/bin
FOR ?=
ARGS ?=
IMAGE ?= vgpu-agent:dev
BASE_IMAGE ?=

.PHONY: help run test quick bench lint fmt proto lock image clean
help: ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

run: .venv/ready ## the agent with simulated GPUs and a stand-in kubelet; FOR=25 ends by itself
	@$(BIN)/vgpu-agent dev $(if $(FOR),--for $(FOR))

test: .venv/ready ## all tests; ARGS go to pytest
	$(BIN)/python -m pytest $(ARGS)

quick: .venv/ready ## the tests that are fast enough to run on every save
	$(BIN)/python -m pytest -m 'not slow'

lint: .venv/ready ## style and types; changes nothing
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: .venv/ready ## print what the agent costs and how fast it is
	$(BIN)/python -m tests.bench

fmt: .venv/ready ## put the code into the common format
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

proto: .venv/ready ## generate vgpu_agent/kubelet/_proto from protos/
	$(BIN)/python -m tests.protoc betterproto vgpu_agent/kubelet/_proto

lock: .venv/ready ## resolve requirements/*.txt anew, with hashes and without addresses
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url --no-emit-find-links pyproject.toml -o requirements/run.txt
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url --no-emit-find-links -c requirements/run.txt pyproject.toml --group dev -o requirements/dev.txt
	echo hatchling | $(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url --no-emit-find-links -c requirements/dev.txt - -o requirements/build.txt

image: ## IMAGE from BASE_IMAGE by docker, podman or buildah; ARGS (--secret …) go to its build
	for tool in docker podman buildah; do $$tool info >/dev/null 2>&1 && break; done; \
	DOCKER_BUILDKIT=1 $$tool build $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) $(ARGS) -t $(IMAGE) .

clean: ## remove everything that was made here
	rm -rf .venv .cache .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist

.venv/installed: requirements/dev.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@touch $@

.venv/ready: .venv/installed pyproject.toml
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
