"""The tests of this folder run in a process of their own, in which Triton interprets: `make kernels`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

_REASON = "Triton interprets kernels only in a process of their own: run `make kernels`"


class _Skipped(pytest.Module):
    def collect(self) -> Iterator[pytest.Item]:
        pytest.skip(_REASON, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    # Where it is set and Triton is missing, the tests fail.
    return None if os.environ.get("TRITON_INTERPRET") == "1" else _Skipped.from_parent(parent, path=module_path)
