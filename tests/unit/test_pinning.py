"""Registering host memory with a device: in pieces, whole or not at all, within the limit, and kept meanwhile."""

from __future__ import annotations

import gc
import logging
import mmap
import resource
import threading
import weakref
from pathlib import Path

import pytest
import torch

from tests.support import fake_cuda
from tests.support.fake_cuda import FakeCuda
from tests.support.homes import random_bits
from vllm_moecxl.data.devices import cuda
from vllm_moecxl.data.devices.cuda import CudaBackend
from vllm_moecxl.data.devices.pinning import PinnedMemory, pin_limit_bytes
from vllm_moecxl.data.host import anonymous_tensor
from vllm_moecxl.errors import CapacityError

PAGE = mmap.PAGESIZE


class Device:
    """What a driver keeps of registrations, and the rules that it has for them."""

    def __init__(self, refuses_at: int | None = None) -> None:
        self.ranges: dict[int, int] = {}
        self.attempt_count = 0
        self.refuses_at = refuses_at

    def pin(self, address: int, byte_count: int) -> int:
        self.attempt_count += 1
        if self.attempt_count == self.refuses_at:
            return 2
        assert address % PAGE == byte_count % PAGE == 0 < byte_count
        assert all(address + byte_count <= start or start + size <= address for start, size in self.ranges.items())
        self.ranges[address] = byte_count
        return 0

    def unpin(self, address: int) -> None:
        del self.ranges[address]


def pinned(device: Device, limit_bytes: int | None = None, piece_pages: int = 2) -> PinnedMemory:
    return PinnedMemory(device.pin, device.unpin, limit_bytes, piece_pages * PAGE)


def pages(count: float) -> torch.Tensor:
    return anonymous_tensor((int(count * PAGE),), torch.uint8)


@pytest.mark.parametrize(
    ("page_count", "expected"), [(0.001, [1]), (1, [1]), (1.001, [2]), (2, [2]), (2.001, [2, 1]), (5, [2, 2, 1])]
)
def test_memory_is_registered_in_whole_pages_piece_by_piece(page_count: float, expected: list[int]) -> None:
    device, memory = Device(), pages(page_count)
    all_of_it = pinned(device)
    assert all_of_it.add(memory)
    starts = sorted(device.ranges)
    assert [device.ranges[start] // PAGE for start in starts] == expected
    assert starts[0] == memory.data_ptr() and all_of_it.pinned_bytes == sum(expected) * PAGE
    all_of_it.remove(memory)
    assert not device.ranges and not all_of_it.pinned_bytes
    assert all_of_it.add(memory)
    all_of_it.clear()
    assert not device.ranges and not all_of_it.pinned_bytes


def test_memory_that_starts_and_ends_within_pages_takes_these_pages_too() -> None:
    device, memory = Device(), pages(4)
    assert pinned(device).add(memory[PAGE // 2 : 3 * PAGE + 1])
    assert device.ranges == {memory.data_ptr(): 2 * PAGE, memory.data_ptr() + 2 * PAGE: 2 * PAGE}


def test_nothing_is_registered_of_no_memory() -> None:
    device = Device()
    all_of_it = pinned(device)
    assert all_of_it.add(torch.empty(0, dtype=torch.uint8)) and not device.attempt_count
    all_of_it.remove(torch.empty(0, dtype=torch.uint8))


@pytest.mark.parametrize("refused", [1, 2, 3])
def test_a_refused_piece_takes_the_earlier_ones_back_and_says_how_far_it_got(
    refused: int, caplog: pytest.LogCaptureFixture
) -> None:
    device = Device(refuses_at=1 + refused)
    all_of_it = pinned(device, limit_bytes=100 * PAGE)
    first = pages(1)
    assert all_of_it.add(first)
    with caplog.at_level(logging.WARNING, "vllm.moecxl"):
        assert not all_of_it.add(pages(5))
    assert device.ranges == {first.data_ptr(): PAGE} and all_of_it.pinned_bytes == PAGE
    (line,) = caplog.messages
    assert (
        f"20.00 KiB of host memory cannot be registered with the device, beside the 4.00 KiB that are: piece {refused}"
        in line
    )
    assert " of 3 was refused (error 2). Copies go through a staging ring" in line
    assert line.endswith("This process may lock 400.00 KiB (ulimit -l; docker: --ulimit memlock=-1)")


def test_all_memory_together_stays_within_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    device = Device()
    all_of_it = pinned(device, limit_bytes=5 * PAGE)
    kept = [pages(2), pages(3)]
    assert all(map(all_of_it.add, kept))
    attempt_count = device.attempt_count
    with caplog.at_level(logging.WARNING, "vllm.moecxl"):
        assert not all_of_it.add(pages(1))
    assert device.attempt_count == attempt_count and "more than this process may lock" in caplog.text
    all_of_it.remove(kept[0])
    assert all_of_it.add(pages(2))
    assert all_of_it.add(pages(9), is_limited=False), "staging cells are needed whatever the limit"


def test_registered_memory_is_not_freed_before_the_device_has_forgotten_it() -> None:
    all_of_it, memory = pinned(Device()), pages(3)
    address, kept = memory.data_ptr(), weakref.ref(memory)
    assert all_of_it.add(memory)
    del memory
    gc.collect()
    again = kept()
    assert again is not None and again.data_ptr() == address
    all_of_it.remove(again)
    del again
    gc.collect()
    assert kept() is None


def test_a_copy_is_cut_where_pieces_meet_and_nowhere_else() -> None:
    all_of_it, memory = pinned(Device()), pages(6)
    assert all_of_it.add(memory) and all_of_it.add(pages(1)) and all_of_it.add(pages(3))
    start = memory.data_ptr()
    for offset, byte_count, expected in (
        (0, 6 * PAGE, [(0, 2 * PAGE), (2 * PAGE, 4 * PAGE), (4 * PAGE, 6 * PAGE)]),
        (0, 2 * PAGE, [(0, 2 * PAGE)]),
        (2 * PAGE, 2 * PAGE, [(0, 2 * PAGE)]),
        (2 * PAGE - 1, 2, [(0, 1), (1, 2)]),
        (2 * PAGE - 1, 1, [(0, 1)]),
        (7, 3 * PAGE, [(0, 2 * PAGE - 7), (2 * PAGE - 7, 3 * PAGE)]),
        (PAGE, 0, [(0, 0)]),
    ):
        assert [*all_of_it.parts(start + offset, byte_count)] == expected
    all_of_it.remove(memory)
    assert [*all_of_it.parts(start, 6 * PAGE)] == [(0, 6 * PAGE)]


def test_threads_register_and_unregister_beside_each_other() -> None:
    device = Device()
    all_of_it = pinned(device)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(50):
                mine = [pages(count) for count in (1, 3, 5)]
                assert all(map(all_of_it.add, mine))
                for memory in mine:
                    all_of_it.remove(memory)
        except BaseException as error:  # noqa: BLE001  the test fails with it
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and not device.ranges and not all_of_it.pinned_bytes and not all_of_it._seams


@pytest.mark.parametrize(
    ("capabilities", "expected"), [("0000000000004000", None), ("00000000a80425fb", 7), ("0000000000000000", 7)]
)
def test_the_limit_does_not_hold_for_the_privileged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capabilities: str, expected: int | None
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (7, 99))
    status = tmp_path / "status"
    status.write_text(f"Name:\tpython\nCapInh:\tffff\nCapEff:\t{capabilities}\n")
    assert pin_limit_bytes(status) == expected


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    monkeypatch.setattr(cuda, "_cuda", fake := FakeCuda())
    monkeypatch.setattr(cuda, "pin_limit_bytes", lambda: None)
    return fake


def test_the_cuda_backend_says_no_where_the_runtime_does_and_stages_nothing_then(fake: FakeCuda) -> None:
    backend = CudaBackend(torch.device("cpu", 0))
    fake.refuses = 2
    assert not backend.register(pages(3))
    with pytest.raises(CapacityError, match="refuses to register 5 B of host memory for staging: free host memory"):
        backend.stage(5)
    fake.refuses = 0
    assert backend.register(pages(3)) and backend.stage(5).nbytes == 5
    backend._end()


def test_the_cuda_backend_cuts_copies_where_registrations_meet(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CudaBackend(torch.device("cpu", 0))
    monkeypatch.setattr(backend._pinned, "_piece_bytes", PAGE)
    source = pages(4).copy_(random_bits((4 * PAGE,), torch.uint8))
    assert backend.register(source)
    lengths: list[int] = []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda self, other, **how: (lengths.append(other.nbytes), copy(self, other, **how))[1]
    )
    target = backend.allocate((3 * PAGE,), torch.uint8)
    backend.copy(source[10 : 10 + 3 * PAGE], target, backend.copy_stream(0))
    assert lengths == [PAGE - 10, PAGE, PAGE, 10] and torch.equal(target, source[10 : 10 + 3 * PAGE])
    backend._end()


def test_the_cuda_backend_keeps_what_is_copied_until_the_copies_are_done(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = CudaBackend(torch.device("cpu", 0))
    stream = backend.copy_stream(0)

    def copy_once() -> weakref.ref[torch.Tensor]:
        source = backend.stage(10)
        backend.copy(source, backend.allocate((10,), torch.uint8), stream)
        backend.unregister(source)
        return weakref.ref(source)

    sources = [copy_once() for _ in range(3)]
    gc.collect()
    assert all(source() is not None for source in sources)
    event = backend.record(stream)
    gc.collect()
    assert all(source() is not None for source in sources), "the copies are under way"
    backend.synchronize(event)
    backend.record(stream)
    gc.collect()
    assert not any(source() is not None for source in sources)
    monkeypatch.setattr(fake_cuda, "QUERY_COUNT", 0)
    for _ in range(1000):  # nobody records events: what is done is let go all the same
        sources.append(copy_once())
    assert sum(source() is not None for source in sources) < 300


def test_memory_is_unregistered_when_the_cuda_backend_is_gone(fake: FakeCuda) -> None:
    backend = CudaBackend(torch.device("cpu", 0))
    backend.stage(10)
    assert backend.register(pages(2)) and len(fake.registered) == 2
    del backend
    gc.collect()
    assert not fake.registered
