"""The tests of this folder need a CUDA device: `make gpu`. Their rehearsal needs Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

_NO_DEVICE = "there is no CUDA device here: where one is, run `make gpu`"
_NOT_INTERPRETED = "Triton interprets kernels only in a process of their own: run `make kernels`"


class _Skipped(pytest.Module):
    reason = _NO_DEVICE

    def collect(self) -> Iterator[pytest.Item]:
        pytest.skip(self.reason, allow_module_level=True)


class _NotInterpreted(_Skipped):
    reason = _NOT_INTERPRETED


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if module_path.name == "test_rehearsal.py":
        return None if is_interpreted else _NotInterpreted.from_parent(parent, path=module_path)
    # Interpreted kernels are not the device's.
    has_device = torch.cuda.is_available() and not is_interpreted
    return None if has_device else _Skipped.from_parent(parent, path=module_path)
