# Everything a newcomer needs: `make demo` and `make test`. VENV picks another environment folder.
VENV ?= .venv
export VENV
BIN = $(VENV)/bin

.PHONY: env demo test lint unit cxl-vm engine server clean

env:
	@deploy/make_env.sh

demo: env
	@$(BIN)/python deploy/demo.py

test: lint unit cxl-vm engine server

lint: env
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

# The pure tiers: seconds, and first.
unit: env
	@$(BIN)/python -m pytest tests/unit tests/property

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
