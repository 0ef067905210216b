# Every target sets up what it needs; `make` alone lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SPEC ?= pipelines/specs/smart_home.yaml
# Only pip's errors are shown: it warns about every index entry that it passes over.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow check fmt lock bench fuzz clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED) ## make .venv with exactly the locked packages

$(INSTALLED): infra/locks/torch.txt infra/locks/laptop.txt pyproject.toml
	@echo "installing the locked packages into $(VENV) (some minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) -r infra/locks/torch.txt
	@$(PIP) --require-hashes -r infra/locks/laptop.txt
	@$(PIP) --no-build-isolation -e .
	@touch $@

demo: install ## the main job from nothing: dataset and model in, served model out (KEEP=1 goes on serving)
	@$(BIN)/slipway run $(SPEC) $(if $(KEEP),--keep-serving)

test: install ## the tests, from nothing
	@$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: install ## all tests that need no GPU, the long ones too
	@$(BIN)/python -m pytest -m "not gpu"

check: install ## format, lint, types, import boundaries, docstrings
	@$(BIN)/ruff format --check -q .
	@$(BIN)/ruff check -q .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-cache >.lint-imports.log || { cat .lint-imports.log; exit 1; }
	@$(BIN)/pydoclint -q infra pipelines training serving

fmt: install ## write the format that check wants
	@$(BIN)/ruff check -q --fix .
	@$(BIN)/ruff format -q .

lock: ## write infra/locks/laptop.txt from laptop.in (needs uv)
	uv pip compile -q --no-deps --generate-hashes --python-version 3.11 --no-header --no-annotate infra/locks/laptop.in -o infra/locks/laptop.txt

bench: install ## training against TRL where PEER_PYTHON has it, and serving against the bare engine
	@$(BIN)/slipway bench train --json $(if $(PEER_PYTHON),--peer trl --peer-python $(PEER_PYTHON))
	@$(BIN)/slipway bench serve --json

fuzz: ## send a running server (URL=http://127.0.0.1:8000) what its own OpenAPI document allows, and look for 5xx
	@test -x .venv-fuzz/bin/st || { $(PYTHON) -m venv .venv-fuzz && .venv-fuzz/bin/python -m pip install -qq --disable-pip-version-check schemathesis==4.32.5; }
	@.venv-fuzz/bin/st run $(or $(URL),http://127.0.0.1:8000)/openapi.json --checks not_a_server_error --max-examples 150 --suppress-health-check all

clean: ## remove artifacts and runs; .venv stays
	rm -rf .slipway .lint-imports.log
