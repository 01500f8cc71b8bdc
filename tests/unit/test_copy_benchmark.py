"""What `python -m benchmarks copy` makes of its timings, and that it refuses where there is nothing to time."""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import copy
from vllm_moecxl.units import KIB

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({4: 0.5, 8: 0.8, 16: 1.2, 32: 1.5}, 16),
        ({4: 0.5, 8: 0.8}, None),
        ({4: 1.1, 8: 1.2}, 0),
        ({4: 0.2, 8: 1.01, 16: 0.5, 32: 3.0}, 32),
        ({4: 1.01, 8: 0.2, 16: 3.0}, 16),
        ({4: 0.9, 8: 3.0, 16: 0.99, 32: 3.0}, 8),
        ({32: 1.5, 8: 0.8, 4: 0.5, 16: 1.2}, 16),
    ],
)
def test_the_threshold_loses_least_on_both_sides(ratios: dict[int, float], expected: int | None) -> None:
    assert copy.threshold_bytes(ratios) == expected


def case(slab_bytes: int, slab_count: int, kernel_us: dict[int, float], copies_us: float, host_us: float) -> copy.Case:
    """Three rounds, the second on a machine that is ten times as slow."""
    drift = (1.0, 10.0, 1.0)
    device_us: dict[str | int, float] = {"mover": copies_us, "extents": copies_us / 2, **kernel_us}
    return copy.Case(
        slab_bytes,
        slab_count,
        {way: [value * factor for factor in drift] for way, value in device_us.items()},
        {way: [1.0 if isinstance(way, int) else host_us] * 3 for way in device_us},
    )


CASES = [
    case(4 * KIB, 2, {8: 4.0, 64: 1.0}, 4.0, 40.0),
    case(64 * KIB, 2, {8: 30.0, 64: 10.0}, 8.0, 40.0),
    case(4 * KIB, 16, {8: 20.0, 64: 10.0}, 40.0, 400.0),
    case(64 * KIB, 16, {8: 100.0, 64: 90.0}, 80.0, 400.0),
]


def test_figures_are_those_of_the_program_count_that_does_best_over_all() -> None:
    values = copy.summarise(CASES)
    assert values["program_count"] == 64
    first = values["cases"][0]
    assert first["ways"]["64"] == {"device_us": 0.5, "host_us": 0.5, "bytes_per_s": 2 * 4 * KIB * 10**6}
    assert first["kernel_to_copy"] == {"mover": 0.25, "extents": 0.5}, "ratios are within rounds"


def test_what_queueing_takes_the_host_counts_where_the_host_queues() -> None:
    values = copy.summarise(CASES)
    assert values["threshold_bytes"] == {
        "2": {"mover": 64 * KIB, "extents": 64 * KIB},
        "16": {"mover": 64 * KIB, "extents": 64 * KIB},
    }
    assert values["threshold_bytes_host_driven"] == {
        "2": {"mover": None, "extents": None},
        "16": {"mover": None, "extents": None},
    }


def test_the_table_says_where_the_kernel_wins(capsys: pytest.CaptureFixture[str]) -> None:
    copy._print(copy.summarise(CASES))
    printed = capsys.readouterr().out
    assert "inside of a graph, 2 slabs at once: the kernel wins against mover: below 64.00 KiB" in printed
    assert "queued by the host, 16 slabs at once: the kernel wins against mover: always" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds", "0"], "--rounds: '0' is not a positive number"),
        (["--slabs", "4", "many"], "--slabs: 'many' is not a positive number"),
        (["--programs", "-8"], "--programs: '-8' is not a positive number"),
        (["--slab-bytes", "2KiB"], "'2KiB' is not a size such as 64KiB"),
        (["--slab-bytes", "5000B"], "'5000B' is not a size such as 64KiB, a multiple of 16"),
        (["--slab-bytes", "large"], "'large' is not a size"),
    ],
)
def test_impossible_arguments_are_named(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    copy.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(arguments)
    assert said in capsys.readouterr().err


def test_the_hint_lies_inside_of_what_is_measured() -> None:
    assert copy.SLAB_BYTES[0] == 4 * KIB < 28 * KIB < copy.SLAB_BYTES[-1] == 32 * 1024 * KIB
    parser = argparse.ArgumentParser()
    copy.add_arguments(parser)
    args = parser.parse_args(["--slab-bytes", "28KiB", "1MiB"])
    assert args.slab_bytes == [28 * KIB, 1024 * KIB] and args.slabs == copy.SLAB_COUNTS


def test_extents_share_the_memory_and_are_aligned() -> None:
    memory = torch.arange(200, dtype=torch.uint8)
    first, second = copy._rows(memory, 3, (32, 16))
    assert first.shape == (3, 32) and second.shape == (3, 16)
    assert second.data_ptr() - first.data_ptr() == 3 * 32


class Spin:
    """Stands in for `torch.cuda`: a device that spins, and a host that needs a number of cycles for its queueing."""

    def __init__(self, host_cycles: float) -> None:
        self.host_cycles = host_cycles
        self.spins: list[int] = []

    def stream(self, _: object) -> Any:
        return nullcontext()

    def _sleep(self, cycles: int) -> None:
        self.spins.append(cycles)

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        return SimpleNamespace(
            record=lambda: None,
            query=lambda: self.spins[-1] < self.host_cycles,
            synchronize=lambda: None,
            elapsed_time=lambda _: 0.25,
        )


def bench_on(spin: Spin, monkeypatch: pytest.MonkeyPatch) -> copy.Bench:
    for name in ("stream", "_sleep", "Event"):
        monkeypatch.setattr(torch.cuda, name, getattr(spin, name))
    bench = object.__new__(copy.Bench)
    vars(bench).update(stream=SimpleNamespace(stream=None), _spin_cycles=copy._SPIN_CYCLES)
    return bench


def test_a_time_in_which_the_device_waited_for_the_host_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    spin, calls = Spin(3.5 * copy._SPIN_CYCLES), []
    bench = bench_on(spin, monkeypatch)
    device_us, host_us = bench.time(lambda: calls.append(1))
    assert device_us == 250 and 0 < host_us < 1e6
    assert spin.spins == [copy._SPIN_CYCLES, 2 * copy._SPIN_CYCLES, 4 * copy._SPIN_CYCLES] and len(calls) == 3
    bench.time(lambda: None)
    assert len(spin.spins) == 4, "it has learnt how long to spin"


def test_a_queue_that_is_too_short_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="cannot queue all copies ahead: name fewer --slabs"):
        bench_on(Spin(math.inf), monkeypatch).time(lambda: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_device_it_says_so_and_writes_nothing() -> None:
    results = ROOT / "benchmarks" / "results" / "copy.json"
    before = results.read_bytes() if results.exists() else None
    command = [sys.executable, "-m", "benchmarks", "copy", "--json"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith("copy: torch ") and "no CUDA device here" in line
    assert (results.read_bytes() if results.exists() else None) == before
