"""What CudaBackend takes for granted of the driver and of torch, asked of the device; the rest is in the contract."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support.homes import random_bits
from vllm_moecxl.data.devices.cuda import CudaBackend, CudaStream
from vllm_moecxl.data.host import anonymous_tensor
from vllm_moecxl.linux.memory import Mapping
from vllm_moecxl.units import KIB, MIB

#: Long enough for a host to queue something meanwhile, and to look.
_SPIN_CYCLES = 500_000_000


@pytest.fixture
def backend() -> Iterator[CudaBackend]:
    one = CudaBackend(torch.device("cuda", torch.cuda.current_device()))
    yield one
    torch.cuda.synchronize()
    one._end()


def filled(byte_count: int, seed: int = 0) -> torch.Tensor:
    return anonymous_tensor((byte_count,), torch.uint8).copy_(random_bits((byte_count,), torch.uint8, seed))


def test_kernels_reach_registered_memory_at_the_hosts_own_address(backend: CudaBackend) -> None:
    assert backend.can_look_up
    memory = filled(3 * MIB + 5)
    assert backend.register(memory)
    driver, address = ctypes.CDLL("libcuda.so.1"), ctypes.c_uint64()
    assert not driver.cuMemHostGetDevicePointer_v2(ctypes.byref(address), ctypes.c_void_p(memory.data_ptr()), 0)
    assert address.value == memory.data_ptr()


def test_torch_takes_registered_memory_for_pinned(backend: CudaBackend) -> None:
    memory = filled(MIB)
    assert not memory.is_pinned()
    assert backend.register(memory)
    assert memory.is_pinned() and memory[4097:].is_pinned()
    backend.unregister(memory)
    assert not memory.is_pinned()


def test_a_copy_is_queued_and_not_waited_for(backend: CudaBackend) -> None:
    source, target = filled(64 * MIB), backend.allocate((64 * MIB,), torch.uint8)
    assert backend.register(source)
    stream = backend.copy_stream(0)
    assert isinstance(stream, CudaStream)
    cuda: Any = torch.cuda
    with cuda.stream(stream.stream):
        cuda._sleep(_SPIN_CYCLES)
    backend.copy(source, target, stream)
    event = backend.record(stream)
    assert not backend.query(event), "it came back when the copy was done"
    backend.synchronize(event)
    assert torch.equal(target.cpu(), source)


def test_copies_run_while_the_compute_stream_is_busy(backend: CudaBackend) -> None:
    source, target = filled(MIB), backend.allocate((MIB,), torch.uint8)
    assert backend.register(source)
    cuda: Any = torch.cuda
    cuda._sleep(_SPIN_CYCLES)
    busy = backend.record(backend.compute_stream())
    stream = backend.copy_stream(0)
    backend.copy(source, target, stream)
    backend.synchronize(backend.record(stream))
    assert not backend.query(busy), "the copy waited for the kernel"


def test_a_copy_over_the_seam_of_two_registrations_arrives(
    backend: CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend._pinned, "_piece_bytes", 64 * KIB)
    source, target = filled(MIB), backend.allocate((MIB - 200,), torch.uint8)
    assert backend.register(source)
    stream = backend.copy_stream(0)
    backend.copy(source[100:-100], target, stream)
    backend.synchronize(backend.record(stream))
    assert torch.equal(target.cpu(), source[100:-100])


def test_a_registration_that_the_driver_refuses_leaves_nothing_behind(backend: CudaBackend) -> None:
    memory = filled(MIB)
    assert backend.register(memory)
    assert not backend.register(memory.view(-1)[4096:]), "it is registered already"
    torch.ones(10, device="cuda").sum().item()
    backend.unregister(memory)
    assert backend.register(memory)


def test_registered_memory_keeps_what_is_written_to_it_later(backend: CudaBackend) -> None:
    """Homes are filled before they are registered, and a bank that was repaired after it."""
    mapping = Mapping.anonymous(MIB)
    memory = torch.frombuffer(mapping.buffer, dtype=torch.uint8, count=MIB)
    assert backend.register(memory)
    memory.copy_(random_bits((MIB,), torch.uint8, 5))
    target, stream = backend.allocate((MIB,), torch.uint8), backend.copy_stream(0)
    backend.copy(memory, target, stream)
    backend.synchronize(backend.record(stream))
    assert torch.equal(target.cpu(), memory)


@pytest.mark.parametrize("row_bytes", [1, 100, 16 * KIB + 3, 512 * KIB])
def test_rows_of_any_size_are_copied_on_the_device(backend: CudaBackend, row_bytes: int) -> None:
    sources = [random_bits((40, row_bytes), torch.uint8, seed).cuda() for seed in range(3)]
    targets = [backend.allocate((30, row_bytes), torch.uint8) for _ in sources]
    source_ids, target_ids = [39, 0, 7, 21, 3], [0, 29, 4, 9, 11]
    backend.copy_rows(sources, source_ids, targets, target_ids)
    backend.synchronize(backend.record(backend.compute_stream()))
    for source, target in zip(sources, targets, strict=True):
        expected = torch.zeros_like(target)
        expected[target_ids] = source[source_ids]
        assert torch.equal(target, expected)
