"""What `make gpu` will do, as far as it can be done without a GPU: the same code, kernels interpreted on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from moecxl_kernels import gather

from benchmarks import copy
from tests.gpu.visits import Visits
from tests.support.fake_cuda import FakeCuda
from vllm_moecxl.data.devices import cuda
from vllm_moecxl.data.devices.cpu import CpuBackend
from vllm_moecxl.data.devices.cuda import CudaBackend
from vllm_moecxl.units import KIB, MIB


def test_visits_are_those_of_the_reference() -> None:
    visits = Visits(CpuBackend(), torch.device("cpu"))
    for _ in range(40):
        visits.change()
        visits.visit(visits.work)
    assert visits.twin.totals[1] and visits.twin.totals[2] and visits.twin.totals[5], "hits, misses, adopted offers"


def test_a_wrong_byte_in_a_slot_is_found() -> None:
    visits = Visits(CpuBackend(), torch.device("cpu"))
    visits.is_padding[:] = False
    visits.visit(visits.work)
    visits.slots[1][int(visits.table.slot_of[0]), 5] += 1
    with pytest.raises(AssertionError):
        visits.visit(visits.work)


def ferry(names: str) -> subprocess.CompletedProcess[str]:
    command = ["-m", "pytest", "-v", "-p", "tests.gpu.ferry", "--ferry-to", "cpu", "-k", names, "tests/kernels"]
    return subprocess.run([sys.executable, *command], env=os.environ, capture_output=True, text=True, check=False)


def test_the_kernels_own_tests_run_ferried_but_for_what_looks_at_the_interpreter() -> None:
    run = ferry("quantised or routes_get or passes_over or an_offer_waits or each_byte or past_the_edge or compacted")
    assert run.returncode == 0, run.stdout
    calls = re.search(r"(\d+) calls of kernels on cpu", run.stdout)
    assert calls and int(calls[1]) > 0
    for name in ("quantised", "routes_get", "passes_over", "an_offer_waits", "compacted"):
        assert re.search(rf"{name}.* PASSED", run.stdout), name
    assert "each_byte" not in run.stdout and "past_the_edge" not in run.stdout


def test_a_run_in_which_no_kernel_was_called_has_failed() -> None:
    run = ferry("words_say")
    assert run.returncode == 1 and "1 passed" in run.stdout and "0 calls of kernels on cpu" in run.stdout


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The copy benchmark's memory and streams on stand-ins for the device's; its clock stands still."""
    monkeypatch.setattr(cuda, "_cuda", FakeCuda())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(copy, "_POOL_BYTES", MIB)
    backend = CudaBackend(torch.device("cpu", 0))
    pool, slots = torch.randint(256, (MIB,), dtype=torch.uint8), torch.zeros(MIB, dtype=torch.uint8)

    def time(work: Callable[[], None]) -> tuple[float, float]:
        work()
        return 2.0, 1.0

    device = torch.device("cpu")
    yield SimpleNamespace(
        backend=backend, device=device, pool=pool, slots=slots, stream=backend.copy_stream(0), time=time
    )
    backend._end()


@pytest.mark.parametrize(("slab_bytes", "slab_count"), [(4 * KIB, 3), (100 * KIB, 2)])
def test_every_way_of_the_copy_benchmark_copies(bench: Any, slab_bytes: int, slab_count: int) -> None:
    case = copy.measure(bench, slab_bytes, slab_count, (2, 5), 2)
    assert case.device_us == {way: [2.0, 2.0] for way in ("mover", "extents", 2, 5)}
    values = copy.summarise([case])
    assert values["cases"][0]["ways"]["2"]["bytes_per_s"] == slab_bytes * slab_count / 2 * 10**6


def test_short_rows_are_copied_in_one_launch_and_their_map_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_cuda", FakeCuda())
    backend = CudaBackend(torch.device("cpu", 0))
    called: list[str] = []
    for name in ("gather_slabs", "slab_map"):
        function = getattr(gather, name)
        monkeypatch.setattr(gather, name, lambda *a, name=name, function=function: called.append(name) or function(*a))
    random = torch.Generator().manual_seed(1)
    shapes = [((7,), torch.int8), ((3, 5), torch.float32), ((1000,), torch.bfloat16), ((40 * KIB,), torch.uint8)]
    sources, targets = (
        [torch.randint(100, (count, *shape), generator=random).to(dtype) for shape, dtype in shapes] for count in (9, 6)
    )
    for source_ids, target_ids in (([8, 0, 3], [5, 0, 2]), ([1], [4])):
        before = [target.clone() for target in targets]
        backend.copy_rows(sources, source_ids, targets, target_ids)
        for source, target, expected in zip(sources, targets, before, strict=True):
            expected[target_ids] = source[source_ids]
            assert torch.equal(target, expected)
    assert called == ["slab_map", "gather_slabs", "gather_slabs"]
    others = [torch.zeros_like(target) for target in targets]
    backend.copy_rows(sources, [2], others, [1])
    assert all(torch.equal(other[1], source[2]) for other, source in zip(others, sources, strict=True))
    with pytest.raises(AssertionError):
        backend.copy_rows(sources[:3], [0], targets[:3], [6])


def test_a_copy_that_does_not_arrive_ends_the_benchmark(bench: Any) -> None:
    bench.time = lambda work: (1.0, 1.0)
    with pytest.raises(RuntimeError, match=r"copy: 2: slab 0 of \d+ B is not what its home holds"):
        copy.measure(bench, 4 * KIB, 3, (2,), 1)
