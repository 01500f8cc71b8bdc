"""The staging ring: no cell is filled while a copy reads it, and no two threads have one cell."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest
import torch

from vllm_moecxl.data.devices.base import Event
from vllm_moecxl.data.devices.cpu import CpuBackend
from vllm_moecxl.data.staging import StagingRing
from vllm_moecxl.errors import CapacityError

WAIT_S = 20


class SlowEvent(Event):
    """Complete when the test says so."""

    def __init__(self) -> None:
        self.is_complete = threading.Event()


class SlowBackend(CpuBackend):
    """Copies that take as long as the test wants.

    Attributes:
        awaited: events that somebody waits, or has waited, for.
    """

    def __init__(self) -> None:
        self.awaited: list[Event] = []
        self.is_awaited = threading.Event()
        self.failure: Exception | None = None

    def query(self, event: Event) -> bool:
        assert isinstance(event, SlowEvent)
        return event.is_complete.is_set()

    def synchronize(self, event: Event) -> None:
        assert isinstance(event, SlowEvent)
        self.awaited.append(event)
        self.is_awaited.set()
        if self.failure is not None:
            raise self.failure
        assert event.is_complete.wait(WAIT_S)


class Taker:
    """A thread that acquires a cell."""

    def __init__(self, ring: StagingRing) -> None:
        self.cell: torch.Tensor | None = None
        self._ring = ring
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.cell = self._ring.acquire()

    def result(self) -> torch.Tensor:
        self._thread.join(WAIT_S)
        assert self.cell is not None
        return self.cell


def spin_until(is_so: Callable[[], bool]) -> None:
    """For what another thread does and gives no event for."""
    for _ in range(10_000_000):
        if is_so():
            return
    raise AssertionError("it did not happen")


def test_cells_are_as_large_as_asked_for_and_all_different() -> None:
    ring = StagingRing(CpuBackend(), 1001, 3)
    cells = [ring.acquire() for _ in range(3)]
    assert ring.cell_bytes == 1001 and all(cell.shape == (1001,) and cell.dtype is torch.uint8 for cell in cells)
    for index, cell in enumerate(cells):
        cell.fill_(index)
    assert all((cell == index).all() for index, cell in enumerate(cells))


def test_cells_take_turns() -> None:
    backend = SlowBackend()
    ring = StagingRing(backend, 10, 3)
    addresses = []
    for _ in range(7):
        cell, event = ring.acquire(), SlowEvent()
        event.is_complete.set()
        addresses.append(cell.data_ptr())
        ring.release_after(cell, event)
    assert len(set(addresses[:3])) == 3 and addresses == (addresses[:3] * 3)[:7] and not backend.awaited


def test_a_cell_is_not_handed_out_while_a_copy_reads_it() -> None:
    backend = SlowBackend()
    ring = StagingRing(backend, 10, 2)
    cells, events = [ring.acquire(), ring.acquire()], [SlowEvent(), SlowEvent()]
    for cell, event in zip(cells, events, strict=True):
        ring.release_after(cell, event)
    taker = Taker(ring)
    assert backend.is_awaited.wait(WAIT_S)
    assert taker.cell is None and backend.awaited == [events[0]], "the oldest use ends first"
    events[0].is_complete.set()
    assert taker.result() is cells[0]


def test_a_cell_whose_copy_is_complete_comes_before_an_older_one_whose_is_not() -> None:
    backend = SlowBackend()
    ring = StagingRing(backend, 10, 3)
    cells, events = [ring.acquire() for _ in range(3)], [SlowEvent(), SlowEvent(), SlowEvent()]
    for cell, event in zip(cells, events, strict=True):
        ring.release_after(cell, event)
    events[1].is_complete.set()
    assert ring.acquire() is cells[1] and not backend.awaited


def test_a_cell_that_nothing_was_copied_from_is_ready_at_once() -> None:
    backend = SlowBackend()
    ring = StagingRing(backend, 10, 1)
    cell = ring.acquire()
    ring.release_after(cell, None)
    assert ring.acquire() is cell and not backend.awaited


def test_whoever_finds_all_cells_taken_waits_until_one_comes_back() -> None:
    ring = StagingRing(SlowBackend(), 10, 2)
    cells = [ring.acquire(), ring.acquire()]
    takers = [Taker(ring), Taker(ring)]
    spin_until(lambda: len(ring._returned._waiters) == 2)  # type: ignore[attr-defined]
    assert all(taker.cell is None for taker in takers)
    ring.release_after(cells[1], None)
    spin_until(lambda: any(taker.cell is not None for taker in takers))
    assert [taker.cell for taker in takers].count(None) == 1
    ring.release_after(cells[0], None)
    assert {taker.result().data_ptr() for taker in takers} == {cell.data_ptr() for cell in cells}


def test_one_thread_that_waits_for_a_copy_does_not_keep_the_others_from_ready_cells() -> None:
    backend = SlowBackend()
    ring = StagingRing(backend, 10, 2)
    slow, other = ring.acquire(), ring.acquire()
    ring.release_after(slow, event := SlowEvent())
    waiting = Taker(ring)
    assert backend.is_awaited.wait(WAIT_S)
    ring.release_after(other, None)
    assert ring.acquire() is other and waiting.cell is None
    event.is_complete.set()
    assert waiting.result() is slow


def test_a_wait_that_fails_leaves_the_cell_to_the_next() -> None:
    backend = SlowBackend()
    ring = StagingRing(backend, 10, 1)
    cell = ring.acquire()
    ring.release_after(cell, event := SlowEvent())
    backend.failure = RuntimeError("the device is gone")
    with pytest.raises(RuntimeError, match="gone"):
        ring.acquire()
    event.is_complete.set()
    assert ring.acquire() is cell


def test_a_cell_comes_back_once() -> None:
    ring = StagingRing(CpuBackend(), 10, 2)
    cell = ring.acquire()
    ring.release_after(cell, None)
    with pytest.raises(AssertionError, match="nobody has this cell"):
        ring.release_after(cell, None)
    with pytest.raises(AssertionError, match="nobody has this cell"):
        ring.release_after(torch.zeros(10, dtype=torch.uint8), None)


def test_memory_that_cannot_be_staged_is_the_callers_error() -> None:
    class Full(CpuBackend):
        def stage(self, byte_count: int) -> torch.Tensor:
            raise CapacityError("full")

    with pytest.raises(CapacityError, match="full"):
        StagingRing(Full(), 10, 1)


def test_threads_never_share_a_cell_and_never_fill_one_that_is_read() -> None:
    """Copies of a thread end in any order, some time after their cells have come back."""
    backend = SlowBackend()
    ring = StagingRing(backend, 64, 3)
    flying: list[tuple[SlowEvent, torch.Tensor, int]] = []
    lock, failures, is_over = threading.Lock(), [], threading.Event()

    def complete() -> None:
        chance = random.Random(5)
        while not (is_over.is_set() and not flying):
            with lock:
                if flying:
                    event, cell, value = flying.pop(chance.randrange(len(flying)))
                    if not (cell == value).all():
                        failures.append(f"{value} was overwritten while it was read")
                    event.is_complete.set()

    def work(first: int) -> None:
        for value in range(first, first + 60):
            cell, event = ring.acquire(), SlowEvent()
            cell.fill_(value)
            if not (cell == value).all():
                failures.append(f"{value} was overwritten while it was filled")
            with lock:
                flying.append((event, cell, value))
            ring.release_after(cell, event)

    completer = threading.Thread(target=complete)
    workers = [threading.Thread(target=work, args=(first,)) for first in (0, 60, 120, 180)]
    for thread in (completer, *workers):
        thread.start()
    for thread in workers:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    is_over.set()
    completer.join(WAIT_S)
    assert not completer.is_alive() and failures == []
