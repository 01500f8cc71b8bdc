"""Registering host memory with a device: in pieces, whole or not at all, and kept meanwhile."""

from __future__ import annotations

import gc
import logging
import mmap
import threading
import weakref

import pytest
import torch

from vllm_moecxl.data.devices.pinning import PinnedMemory
from vllm_moecxl.data.host import anonymous_tensor

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


def pinned(device: Device, piece_pages: int = 2) -> PinnedMemory:
    return PinnedMemory(device.pin, device.unpin, piece_pages * PAGE)


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
    all_of_it = pinned(device)
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
