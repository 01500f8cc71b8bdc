"""The cgroup of benchmarks: its limit kills, its peak counts memory and page cache, and it leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import cgroup, page_cache
from vllm_moecxl.units import MIB

_PYTHON = [sys.executable, "-S", "-c"]
#: Python itself takes about 10 MiB.
_LIMIT_BYTES = 64 * MIB


@pytest.fixture(scope="module", autouse=True)
def _cgroups_can_be_made() -> None:
    if reason := cgroup.why_not():
        pytest.skip(reason)


def _allocate(count_mib: int) -> list[str]:
    return [*_PYTHON, f"memory = b'x' * ({count_mib} << 20)"]


def _parent_children() -> set[Path]:
    parent, _ = cgroup._parent()
    return set(parent.glob("moecxl-*"))


def test_a_process_over_the_limit_is_killed_and_reported() -> None:
    usage = cgroup.run(_allocate(200), _LIMIT_BYTES)
    assert usage.return_code == -9
    assert usage.oom_kill_count == 1
    assert usage.peak_bytes <= _LIMIT_BYTES


def test_a_process_within_the_limit_runs_and_its_peak_is_reported() -> None:
    usage = cgroup.run(_allocate(40), _LIMIT_BYTES)
    assert (usage.return_code, usage.oom_kill_count) == (0, 0)
    assert 40 * MIB < usage.peak_bytes <= _LIMIT_BYTES


def test_the_same_process_runs_without_a_limit() -> None:
    usage = cgroup.run(_allocate(200))
    assert (usage.return_code, usage.oom_kill_count) == (0, 0)
    assert usage.peak_bytes > 200 * MIB


def test_page_cache_is_charged_to_whoever_reads_a_dropped_file_and_stays_within_the_limit(tmp_path: Path) -> None:
    file = tmp_path / "large"
    file.write_bytes(bytes(128 * MIB))
    read = [*_PYTHON, f"f = open({str(file)!r}, 'rb')\nwhile f.read(1 << 20): pass"]
    free_ride = cgroup.run(read, _LIMIT_BYTES)
    assert free_ride.peak_bytes < _LIMIT_BYTES // 2
    assert page_cache.cached_bytes([file]) == 128 * MIB

    page_cache.drop([file])
    assert page_cache.cached_bytes([file]) == 0
    charged = cgroup.run(read, _LIMIT_BYTES)
    assert charged.return_code == 0
    assert _LIMIT_BYTES * 3 // 4 < charged.peak_bytes <= _LIMIT_BYTES


def test_a_command_that_takes_too_long_is_killed_and_the_cgroup_is_removed() -> None:
    before = _parent_children()
    with pytest.raises(subprocess.TimeoutExpired):
        cgroup.run(["sleep", "60"], timeout_s=0.05)
    assert _parent_children() == before
