# Every target sets up .venv when it is missing or older than its inputs, and does nothing twice.
PYTHON ?= python3
BIN := .venv/bin
FOR ?=
SEEDS ?= 20
STEPS ?= 1000
HOSTILE ?=
RESTARTS ?=
ARGS ?=
IMAGE ?= vgpu-agent:dev
BASE_IMAGE ?=
REGISTRY ?=
SOURCE ?=
# Extras are kept: without `coverage[toml]` in the lock, pip before 24 resolves it outside of the lock.
COMPILE = $(BIN)/uv pip compile -q $(ARGS) --universal --python-version 3.11 --no-strip-extras \
	--generate-hashes --no-header --no-emit-index-url --no-emit-find-links

# pytest keeps the tests as it rewrote them beside them; without, every worker does it at every run.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help run seconds test quick test-faults numbers bench lint fmt proto lock image dist clean
help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

run: seconds .venv/run ## the agent with simulated GPUs and a stand-in kubelet; FOR=25 ends by itself
	@$(BIN)/vgpu-agent dev $(if $(FOR),--for $(FOR))

# Said before a set-up, not after it.
seconds:
	@case '$(FOR)' in *[!0-9.]* | 0) echo "vgpu-agent: FOR=$(FOR): a number of seconds above 0 is needed" >&2; exit 2; esac

test: .venv/dev ## all tests but those that take a minute, which .ci/run runs too; ARGS go to pytest
	$(BIN)/python -m pytest -n auto --dist loadgroup -m 'not ci' $(ARGS)

quick: .venv/dev ## the tests that are fast enough to run on every save
	$(BIN)/python -m pytest -n logical -m 'not slow and not ci' --hypothesis-profile=quick $(ARGS)

test-faults: numbers .venv/dev ## faults at random: SEEDS=20 STEPS=1000; or HOSTILE=1000000, or RESTARTS=100
	$(BIN)/python -m tests.faults --seeds $(SEEDS) --steps $(STEPS) \
		$(if $(HOSTILE),--hostile $(HOSTILE)) $(if $(RESTARTS),--restarts $(RESTARTS)) $(ARGS)

# Said before a set-up, not after it.
numbers:
	@for each in 'SEEDS=$(SEEDS)' 'STEPS=$(STEPS)' 'HOSTILE=$(or $(HOSTILE),1)' 'RESTARTS=$(or $(RESTARTS),1)'; do \
		case "$${each#*=}" in '' | *[!0-9]* | 0*) echo "vgpu-agent: $$each: a whole number above 0 is needed" >&2; exit 2; esac; done

lint: .venv/dev ## style and types; changes nothing
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: .venv/dev ## what the agent costs and how fast it is, beside bare servers; ARGS=--help
	$(BIN)/python -m tests.bench $(ARGS)

fmt: .venv/dev ## put the code into the common format
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

proto: .venv/dev ## generate vgpu_agent/kubelet/_proto from protos/
	$(BIN)/python -m tests.protoc betterproto vgpu_agent/kubelet/_proto

lock: .venv/dev ## resolve requirements/*.txt again, keeping pins; ARGS=--upgrade takes the newest
	$(COMPILE) pyproject.toml -o requirements/run.txt
	$(COMPILE) -c requirements/run.txt pyproject.toml --group dev -o requirements/dev.txt
	echo hatchling | $(COMPILE) -c requirements/dev.txt - -o requirements/build.txt

image: ## IMAGE from BASE_IMAGE by docker, podman or buildah; ARGS (--secret …) go to its build
	for tool in docker podman buildah; do $$tool info >/dev/null 2>&1 && break; done; \
	DOCKER_BUILDKIT=1 $$tool build $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) $(ARGS) -t $(IMAGE) .

dist: .venv/dev ## the files of a release in dist/; ARGS=--no-image leaves the image out
	@$(BIN)/python -m tools.dist $(if $(REGISTRY),--registry $(REGISTRY)) \
		$(if $(SOURCE),--source $(SOURCE)) $(if $(BASE_IMAGE),--base-image $(BASE_IMAGE)) $(ARGS)

clean: ## remove everything that was made here
	rm -rf .venv .cache .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist

.venv/run: requirements/run.txt requirements/build.txt pyproject.toml
	@requirements/setup run $(PYTHON)

.venv/dev: .venv/run requirements/dev.txt
	@requirements/setup dev $(PYTHON)
