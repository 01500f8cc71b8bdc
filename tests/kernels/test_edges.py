"""No kernel touches memory beyond what it was given."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("kernel", ["gather", "remap", "gate"])
def test_nothing_is_read_or_written_past_the_edge_of_mapped_memory(kernel: str) -> None:
    command = [sys.executable, "-m", "tests.kernels.edges", kernel]
    assert subprocess.run(command, check=False).returncode == 0
    # One element more, and the process is killed: the edge is a real one.
    assert subprocess.run([*command, "--beyond"], check=False).returncode < 0
