"""Benchmarks: `python -m benchmarks NAME [--json]`; results, each with its label, go to `benchmarks/results/`."""
