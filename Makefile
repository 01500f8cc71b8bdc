# Everything a newcomer needs: `make demo` and `make test`. VENV picks another environment folder.
VENV ?= .venv
export VENV
BIN = $(VENV)/bin

.PHONY: env demo test first-half second-half lint unit pure modelled seams races kernels cxl-vm engine equality other-engine server gpu clean

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
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target kernels modelled pure

pure: env
	@$(BIN)/python -m pytest tests/unit
	@$(BIN)/python -m pytest tests/seams -rs

modelled: env
	@$(BIN)/python -m pytest tests/property tests/simulation

# vLLM's own source, release by release, against all that we rely on; `make seams RELEASES=0.34.0` looks at another.
RELEASES ?=
seams: env
	@VLLM_RELEASES="$(RELEASES)" $(BIN)/python -m pytest tests/seams -rs

# Schedules of the modelled accelerator; `make races SCHEDULES=1000000` for a long search.
SCHEDULES ?= 100000
races: env
	@$(BIN)/python -m pytest tests/races
	@$(BIN)/python -m tests.races --schedules $(SCHEDULES)

# Triton's kernels, interpreted against torch, and compiled for devices that are not here; then a table of what they need.
# Triton is unpacked once (200 MB), outside of the environment, and has to be there: nothing is skipped.
kernels: env
	@triton=$$(deploy/make_triton.sh) && export PYTHONPATH="$$triton$${PYTHONPATH:+:$$PYTHONPATH}" && \
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels tests/gpu/test_rehearsal.py && \
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/engine/test_device_driven.py && $(BIN)/python -m tests.kernels

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

# All that needs a CUDA device, in an environment of its own with vLLM's CUDA build; `make gpu STEPS="copy graph"` for a
# part. What came of it is in gpu-report.md.
VENV_GPU ?= .venv-gpu
STEPS ?=
gpu:
	@VENV_GPU="$(VENV_GPU)" deploy/gpu.sh $(STEPS)

clean:
	rm -rf $(VENV)
