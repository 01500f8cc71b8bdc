# Everything a newcomer needs: `make demo` and `make test`. VENV picks another environment folder.
VENV ?= .venv
export VENV
BIN = $(VENV)/bin

.PHONY: env demo test lint unit races cxl-vm engine server beside-engines clean

env:
	@deploy/make_env.sh

demo: env
	@$(BIN)/python deploy/demo.py

# Engines compute on one core: what needs no engine of this process runs on the other one meanwhile.
test: lint unit
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target engine beside-engines

beside-engines: env
	@$(MAKE) --no-print-directory --jobs 1 races cxl-vm server

lint: env
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

# The pure tiers: seconds, and first.
unit: env
	@$(BIN)/python -m pytest tests/unit tests/property

# Schedules of the modelled accelerator; `make races SCHEDULES=1000000` for a long search.
SCHEDULES ?= 100000
races: env
	@$(BIN)/python -m pytest tests/races
	@$(BIN)/python -m tests.races --schedules $(SCHEDULES)

# CXL memory on a real kernel in a virtual machine: fetched once (80 MB), skipped with a reason where it cannot be had.
cxl-vm: env
	@$(BIN)/python -m pytest tests/cxl_vm -rs

# Real engines in one process.
engine: env
	@$(BIN)/python -m pytest tests/engine

# Real servers.
server: env
	@$(BIN)/python -m pytest tests/server

clean:
	rm -rf $(VENV)
