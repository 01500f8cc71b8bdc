# Everything a newcomer needs: `make demo` and `make test`. VENV picks another environment folder.
VENV ?= .venv
export VENV
BIN = $(VENV)/bin

.PHONY: env demo test first-half second-half lint unit pure modelled races cxl-vm engine equality other-engine server clean

env:
	@deploy/make_env.sh

demo: env
	@$(BIN)/python deploy/demo.py

# Engines compute on one core: two halves of about the same length run side by side, each sequentially.
test: lint unit
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target first-half second-half

first-half: env
	@$(MAKE) --no-print-directory --jobs 1 equality races SCHEDULES=30000

second-half: env
	@$(MAKE) --no-print-directory --jobs 1 other-engine cxl-vm server

lint: env
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

# The pure tiers come first, side by side.
unit: env
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target pure modelled

pure: env
	@$(BIN)/python -m pytest tests/unit

modelled: env
	@$(BIN)/python -m pytest tests/property tests/simulation

# Schedules of the modelled accelerator; `make races SCHEDULES=1000000` for a long search.
SCHEDULES ?= 100000
races: env
	@$(BIN)/python -m pytest tests/races
	@$(BIN)/python -m tests.races --schedules $(SCHEDULES)

# CXL memory on a real kernel in a virtual machine: fetched once (80 MB), skipped with a reason where it cannot be had.
cxl-vm: env
	@$(BIN)/python -m pytest tests/cxl_vm -rs

# Real engines in one process: every model and format against unmodified vLLM, and all else.
engine: equality other-engine

equality: env
	@$(BIN)/python -m pytest tests/engine/test_equality.py

other-engine: env
	@$(BIN)/python -m pytest tests/engine --ignore tests/engine/test_equality.py

# Real servers.
server: env
	@$(BIN)/python -m pytest tests/server

clean:
	rm -rf $(VENV)
