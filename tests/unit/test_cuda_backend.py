"""CudaBackend's own code, on a stand-in for `torch.cuda`: what it calls, and not what a GPU makes of it."""

from __future__ import annotations

import gc
import mmap
import threading
import weakref

import pytest
import torch

from tests.support import fake_cuda
from tests.support.fake_cuda import FakeCuda
from tests.support.homes import random_bits
from vllm_moecxl.data.devices import cuda
from vllm_moecxl.data.devices.cuda import CudaBackend, CudaEvent, CudaStream
from vllm_moecxl.data.host import anonymous_tensor
from vllm_moecxl.errors import CapacityError
from vllm_moecxl.linux import affinity
from vllm_moecxl.units import KIB, MIB

PAGE = mmap.PAGESIZE
DEVICE = torch.device("cpu", 0)


def pages(count: int) -> torch.Tensor:
    return anonymous_tensor((count * PAGE,), torch.uint8)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    monkeypatch.setattr(cuda, "_cuda", fake := FakeCuda())
    return fake


def test_the_cuda_backend_says_no_where_the_runtime_does_and_stages_nothing_then(fake: FakeCuda) -> None:
    backend = CudaBackend(DEVICE)
    fake.refuses = 2
    assert not backend.register(pages(3))
    with pytest.raises(CapacityError, match="refuses to register 5 B of host memory for staging: free host memory"):
        backend.stage(5)
    fake.refuses = 0
    assert backend.register(pages(3)) and backend.stage(5).nbytes == 5
    backend._end()


def test_the_cuda_backend_cuts_copies_where_registrations_meet(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CudaBackend(DEVICE)
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
    backend = CudaBackend(DEVICE)
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
    backend = CudaBackend(DEVICE)
    backend.stage(10)
    assert backend.register(pages(2)) and len(fake.registered) == 2
    del backend
    gc.collect()
    assert not fake.registered


def test_copies_are_queued_on_the_stream_of_their_link_without_waiting(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = CudaBackend(DEVICE)
    source, target = backend.stage(5), backend.allocate((5,), torch.uint8)
    queued: list[tuple[object, dict[str, bool]]] = []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda self, other, **how: (queued.append((fake.current, how)), copy(self, other))[1]
    )
    for link_id in (0, 1):
        stream = backend.copy_stream(link_id)
        assert isinstance(stream, CudaStream) and stream.stream is not fake.default
        backend.copy(source, target, stream)
        assert queued.pop() == (stream.stream, {"non_blocking": True})
    assert fake.current is fake.default and backend.copy_stream(0) is not backend.copy_stream(1)
    backend._end()


def test_events_are_recorded_on_their_stream_and_waited_for_by_the_other(fake: FakeCuda) -> None:
    backend = CudaBackend(DEVICE)
    copies, compute = backend.copy_stream(0), backend.compute_stream()
    assert isinstance(copies, CudaStream) and isinstance(compute, CudaStream) and compute.stream is fake.default
    event = backend.record(copies)
    assert isinstance(event, CudaEvent) and event.event.stream is copies.stream
    backend.wait(compute, event)
    assert fake.default.waited_for == [event.event] and not copies.stream.waited_for


@pytest.mark.parametrize(("row_bytes", "is_short"), [(KIB, True), (28 * KIB - 1, True), (28 * KIB, False)])
def test_only_rows_that_the_copy_engine_is_slow_at_are_left_to_the_kernel(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch, row_bytes: int, is_short: bool
) -> None:
    backend = CudaBackend(DEVICE)
    launched: list[int] = []
    monkeypatch.setattr(backend, "_gather_rows", lambda pairs, *ids: launched.append(len(pairs)))
    sources = [random_bits((3, row_bytes), torch.uint8), random_bits((3, MIB), torch.uint8, 1)]
    targets = [backend.allocate(tuple(source.shape), torch.uint8) for source in sources]
    backend.copy_rows(sources, [2, 0], targets, [0, 1])
    assert launched == [1] * is_short
    assert torch.equal(targets[0][:2], sources[0][[2, 0]]) != is_short
    assert torch.equal(targets[1][:2], sources[1][[2, 0]])
    backend.copy_rows(sources, [], targets, [])
    assert launched == [1] * is_short


def test_memory_is_zeroed_before_a_copy_on_another_stream_could_start(fake: FakeCuda) -> None:
    CudaBackend(DEVICE).allocate((3,), torch.uint8)
    assert fake.default.synchronize_count == 1


def test_a_refused_registration_is_not_left_to_the_next_kernels_check(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime would hand the error to whoever asks next: so somebody asks, and takes it."""
    pending = ["cudaErrorMemoryAllocation"]

    def kernel(*_: object, **__: object) -> None:
        raise RuntimeError(pending.pop())

    monkeypatch.setattr(torch, "ones", kernel)
    backend = CudaBackend(DEVICE)
    assert backend.register(pages(1)) and pending
    fake.refuses = 2
    assert not backend.register(pages(1)) and not pending
    backend._end()


def test_an_adopted_thread_has_the_device_and_runs_near_it(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(affinity, "use_cpus_near", asked.append)
    thread = threading.Thread(target=CudaBackend(DEVICE).adopt_thread)
    thread.start()
    thread.join()
    assert fake.adopted == [thread.ident] and asked == ["0000:17:00.0"]
