"""A layer buffer: whose slabs are in it, what comes of those that were brought ahead, and when it may be written."""

from __future__ import annotations

import pytest
import torch

from tests.support.homes import assert_same_bits, banks_of, dram, random_bits, store
from tests.unit.test_mover import Deferred, fail_reads
from vllm_moecxl.data.devices.cpu import CpuBackend
from vllm_moecxl.data.mover import Mover
from vllm_moecxl.data.slabs import Cells, Home, LayerCells
from vllm_moecxl.errors import TransferError
from vllm_moecxl.runtime.counters import Counters, PrefetchOutcome
from vllm_moecxl.runtime.layer_buffer import LayerBuffer
from vllm_moecxl.types import Cause

EXPERT_COUNT = 5
USEFUL, LATE, WASTED = PrefetchOutcome


class Rig:
    """A buffer, and two layers that use it."""

    def __init__(self, backend: CpuBackend | None = None) -> None:
        self.backend = backend or CpuBackend()
        self.slabs = [random_bits((EXPERT_COUNT, 100), torch.uint8, seed) for seed in (1, 2)]
        bank = dram()
        self.homes: list[Home] = [store({"w": slabs.clone()}, banks=[bank]) for slabs in self.slabs]
        self.counters = Counters([bank.name])
        self.mover = Mover(banks_of(self.homes[0]), self.backend, self.counters, has_hands=False)
        self.cells = LayerCells(self.homes[0].layout, EXPERT_COUNT, self.backend)
        self.buffer = LayerBuffer(self.cells, self.backend, self.mover, self.counters)

    def claim(self, layer_id: int) -> None:
        self.buffer.claim(self.homes[layer_id])

    def arrive(self) -> None:
        while not self.mover.is_idle:
            self.mover.feed()

    def check(self, layer_id: int, expert_ids: list[int]) -> None:
        """These experts of a layer are in their rows."""
        for expert_id in expert_ids:
            assert_same_bits(self.cells.tensors[0][expert_id], self.slabs[layer_id][expert_id])

    @property
    def outcomes(self) -> list[int]:
        return [int(self.counters.values[row]) for row in self.counters.prefetch.values()]

    def moved(self, cause: Cause) -> int:
        """Slabs that were copied."""
        return int(self.counters.values[self.counters.fetch_bytes["dram", cause]]) // 100


def test_what_was_brought_ahead_is_useful_late_or_wasted() -> None:
    rig = Rig()
    rig.claim(0)
    rig.buffer.bring([0, 1, 2], Cause.PREFETCH, 1.0)
    rig.arrive()
    rig.buffer.bring([3], Cause.PREFETCH, 1.0)
    rig.buffer.bring([0, 1, 3, 4], Cause.DEMAND, 0.0)
    rig.buffer.wait([0, 1, 3, 4])
    rig.check(0, [0, 1, 2, 3, 4])
    assert rig.outcomes == [2, 1, 0]
    assert (rig.moved(Cause.PREFETCH), rig.moved(Cause.DEMAND)) == (3, 2), "each slab is copied once"
    rig.buffer.abandon()
    assert rig.outcomes == [2, 1, 1]


def test_a_layer_finds_what_is_still_there_and_nothing_of_another() -> None:
    rig = Rig()
    for layer_id, expected_count in ((0, 5), (0, 5), (1, 10), (0, 15)):
        rig.claim(layer_id)
        assert rig.buffer.belongs_to(rig.homes[layer_id]) and not rig.buffer.belongs_to(rig.homes[1 - layer_id])
        rig.buffer.bring(range(EXPERT_COUNT), Cause.DEMAND, 0.0)
        rig.buffer.wait(range(EXPERT_COUNT))
        rig.check(layer_id, [*range(EXPERT_COUNT)])
        assert rig.moved(Cause.DEMAND) == expected_count


def test_what_another_layer_had_on_its_way_does_not_come() -> None:
    rig = Rig()
    rig.claim(0)
    rig.buffer.bring([0, 1], Cause.PREFETCH, 0.0)
    rig.claim(1)
    rig.buffer.bring([0], Cause.DEMAND, 0.0)
    rig.buffer.wait([0])
    rig.arrive()
    rig.check(1, [0])
    assert rig.moved(Cause.PREFETCH) == 0 and rig.outcomes == [0, 0, 2]


def test_what_is_dropped_is_not_copied_and_can_be_brought_again() -> None:
    rig = Rig()
    rig.claim(0)
    rig.buffer.bring([0], Cause.PREFETCH, 0.0)
    rig.arrive()
    rig.buffer.bring([1, 2], Cause.PREFETCH, 0.0)
    rig.buffer.drop_all_but([2])
    rig.arrive()
    assert rig.moved(Cause.PREFETCH) == 2, "not expert 1"
    rig.buffer.bring([0, 1, 2], Cause.DEMAND, 0.0)
    rig.buffer.wait([0, 1, 2])
    rig.check(0, [0, 1, 2])


def test_rows_that_are_taken_from_slots_are_written_by_nothing_else() -> None:
    rig = Rig()
    slots = Cells(rig.homes[0].layout, 2, rig.backend)
    slots.tensors[0].copy_(random_bits((2, 100), torch.uint8, 9))
    rig.claim(0)
    rig.buffer.bring([3, 4], Cause.PREFETCH, 0.0)
    rig.buffer.take(slots, [1], [3])
    rig.arrive()
    assert_same_bits(rig.cells.tensors[0][3], slots.tensors[0][1])
    rig.check(0, [4])
    assert rig.outcomes == [0, 0, 1]


def test_an_error_leaves_the_buffer_to_nobody_and_the_next_attempt_reads_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig()
    rig.claim(0)
    with monkeypatch.context() as patched:
        fail_reads(patched)
        rig.buffer.bring([0, 1], Cause.DEMAND, 0.0)
        with pytest.raises(TransferError):
            rig.buffer.wait([0, 1])
    assert not rig.buffer.belongs_to(rig.homes[0]) and rig.mover.is_idle
    rig.claim(0)
    rig.buffer.bring([0, 1], Cause.DEMAND, 0.0)
    rig.buffer.wait([0, 1])
    rig.check(0, [0, 1])


def test_an_error_that_nobody_waited_for_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    rig.claim(0)
    with monkeypatch.context() as patched:
        fail_reads(patched)
        rig.buffer.bring([0, 1], Cause.PREFETCH, 0.0)
        rig.arrive()
    rig.buffer.bring([0, 1], Cause.DEMAND, 0.0)
    rig.buffer.wait([0, 1])
    rig.check(0, [0, 1])


def test_a_buffer_is_written_only_when_the_last_kernel_that_reads_it_has_run() -> None:
    check_reading()


def check_reading() -> None:
    rig = Rig(backend := Deferred())
    rig.mover.mark_registered("dram")
    compute = backend.compute_stream()
    seen: list[torch.Tensor] = []
    layer_ids = (0, 1, 0)
    for layer_id in layer_ids:
        rig.claim(layer_id)
        rig.buffer.bring([2], Cause.DEMAND, 0.0)
        rig.buffer.wait([2])
        compute.work.append(lambda: seen.append(rig.cells.tensors[0][2].clone()))  # type: ignore[attr-defined]
        rig.buffer.was_read()
    backend.synchronize(backend.record(backend.copy_stream(0)))
    backend.finish_kernels()
    for found, layer_id in zip(seen, layer_ids, strict=True):
        assert torch.equal(found, rig.slabs[layer_id][2]), "a row was written while a kernel read it"
