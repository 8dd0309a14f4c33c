# make run | test | check | bench | soak; everything else is beneath. Needs Python 3.11+ with venv, nothing more.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Touched when the environment holds what requirements/ and pyproject.toml say.
READY := $(VENV)/.ready
PINNED = --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header $(UPGRADE)
COMPILE = $(BIN)/uv pip compile pyproject.toml $(PINNED)
PACKAGES := pipeline agents gateway loadtest millrace tests

# Some images of Python set it. Each of the hundreds of processes that tests start would then compile what it imports:
# 3 to 4 s of processor time for one that predicts.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help run test check lint unit bench soak bench-check cluster-check kube-score rights images asyncapi manifests dashboards requirements clean

help: ## Say what there is
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

run: $(READY) ## Run everything on this machine; make run ARGS=--once ends after the samples
	@$(BIN)/millrace up $(ARGS)

test: $(READY) ## Run all tests against real Kafka and PostgreSQL; ARGS go to pytest
	@$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder $(ARGS)

check: lint unit ## Format, lint, types, imports, unit tests

lint: $(READY)
	@$(BIN)/ruff format --check $(PACKAGES)
	@$(BIN)/ruff check $(PACKAGES)
	@$(BIN)/mypy
	@$(BIN)/lint-imports

unit: $(READY)
	@$(BIN)/python -m pytest tests/unit --quiet -n 2 $(ARGS)

bench: $(READY) ## Measure spine, engine and telemetry next to loops written by hand, as tables and as JSON
	@$(BIN)/millrace bench $(ARGS)
	@$(BIN)/millrace bench-engine $(ARGS)
	@$(BIN)/millrace bench-telemetry $(ARGS)

soak: $(READY) ## Ten minutes of load: flat memory, flat ledger depth
	@$(BIN)/millrace soak $(ARGS)

images: $(READY) ## Build all images and run them against real Kafka and PostgreSQL; needs Docker and 40 GB
	@MILLRACE_TEST_IMAGES=all $(BIN)/python -m pytest tests/e2e/test_images.py -rP $(ARGS)

# Once 20 minutes of building (on two busy cores), a minute from then on. Wants MILLRACE_SCHEMAS, a folder with the custom resource definitions.
cluster-check: $(READY) ## Apply the manifests to a real API server, which is built from the Go module proxy
	@MILLRACE_TEST_KUBE=$$($(BIN)/python -m tests.cluster.programs) $(BIN)/python -m pytest tests/cluster $(ARGS)

kube-score: $(READY) ## Have kube-score look at the manifests; each exception is explained in tests/support/kube_score.py
	@$(BIN)/python -m tests.support.kube_score && echo "nothing that is not explained"

rights: $(READY) ## Take each right of each Kafka user away in turn, and see that something fails; USERS=store,watch for some
	@MILLRACE_TEST_EVERY_RIGHT=$(or $(USERS),all) $(BIN)/python -m pytest tests/e2e/test_rights.py -k spared --capture=no $(ARGS)

bench-check: $(READY) ## Run the tests of all measuring commands, the long ones too
	@MILLRACE_TEST_BENCHES=1 $(BIN)/python -m pytest tests/e2e/test_measuring.py $(ARGS)

asyncapi: $(READY) ## Write docs/asyncapi.json from the topic table and the event types
	@$(BIN)/python -m pipeline.asyncapi > docs/asyncapi.json

manifests: $(READY) ## Write the KafkaTopics and KafkaUsers from the tables of topics and rights
	@$(BIN)/python -m pipeline.strimzi

dashboards: $(READY) ## Make the JSON of Grafana dashboards from the YAML beside it
	@$(BIN)/python -m millrace.dashboards

requirements: $(READY) ## Pin what pyproject.toml asks for; UPGRADE=--upgrade for newer versions
	echo uv | $(BIN)/uv pip compile - $(PINNED) --output-file requirements/uv.txt
	$(COMPILE) --all-extras --group dev --output-file requirements/all.txt
	$(COMPILE) --constraint requirements/all.txt --extra gateway --output-file requirements/gateway.txt
	$(COMPILE) --constraint requirements/all.txt --extra steps --extra database --extra gpu --extra cli --output-file requirements/steps.txt
	$(COMPILE) --constraint requirements/all.txt --extra steps --extra models --extra gpu --output-file requirements/worker.txt
	$(if $(TORCH_INDEX),$(COMPILE) --constraint requirements/all.txt --extra steps --extra models --extra gpu --index $(TORCH_INDEX) --index-strategy unsafe-best-match --output-file requirements/worker-cpu.txt)
	echo 'setuptools>=80' | $(BIN)/uv pip compile - --constraint requirements/all.txt $(PINNED) --output-file requirements/build.txt

clean: ## Delete the environment and caches; data stays in .millrace
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	find $(PACKAGES) -name __pycache__ -prune -exec rm -rf {} +

# venv and pip come with Python, uv through pip, all else through uv: it links a 5 GB torch where pip copies it.
$(READY): requirements/uv.txt requirements/all.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Millrace needs Python 3.11 or newer; make PYTHON=... names one")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
	@$(BIN)/uv pip install --python $(BIN)/python --require-hashes -r requirements/all.txt
	@$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@
