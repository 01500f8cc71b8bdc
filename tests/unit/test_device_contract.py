"""What every device backend promises, asked of each of them."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.races.choosers import RandomChooser
from tests.support.fake_cuda import FakeCuda
from tests.support.homes import random_bits
from vllm_moecxl.data.devices import cuda
from vllm_moecxl.data.devices.base import DeviceBackend, Stream
from vllm_moecxl.data.devices.cpu import CpuBackend
from vllm_moecxl.data.devices.cuda import CudaBackend
from vllm_moecxl.data.devices.modelled import ModelledBackend
from vllm_moecxl.data.host import anonymous_tensor
from vllm_moecxl.units import MIB

PAGE_BYTES = mmap.PAGESIZE
SIZES = (1, 7, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1, MIB + 3)


def on_the_cpu(_: pytest.MonkeyPatch) -> Iterator[DeviceBackend]:
    yield CpuBackend()


def on_a_gpu(_: pytest.MonkeyPatch) -> Iterator[DeviceBackend]:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    yield CudaBackend(torch.device("cuda"))


def on_a_stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceBackend]:
    """CudaBackend's own code, on the host: see `FakeCuda`."""
    monkeypatch.setattr(cuda, "_cuda", fake := FakeCuda())
    # Triton need not be there: `tests/gpu/test_rehearsal.py` has short rows copied by the kernel.
    monkeypatch.setattr(cuda, "COPY_ENGINE_MIN_BYTES", 0)
    backend = CudaBackend(torch.device("cpu", 0))
    yield backend
    backend._end()
    assert not fake.registered, "memory is still registered"


def on_the_model(_: pytest.MonkeyPatch) -> Iterator[DeviceBackend]:
    backend = ModelledBackend(RandomChooser(7))
    yield backend
    backend.finish()


FACTORIES: dict[str, Callable[[pytest.MonkeyPatch], Iterator[DeviceBackend]]] = {
    "cpu": on_the_cpu,
    "cuda": on_a_gpu,
    "cuda-stand-in": on_a_stand_in,
    "modelled": on_the_model,
}


@pytest.fixture(params=FACTORIES)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceBackend]:
    yield from FACTORIES[request.param](monkeypatch)


def staged(backend: DeviceBackend, byte_count: int, seed: int = 0) -> torch.Tensor:
    """A staging cell of random bytes."""
    return backend.stage(byte_count).copy_(random_bits((byte_count,), torch.uint8, seed))


def finish(backend: DeviceBackend, stream: Stream) -> None:
    """Wait for all that is queued on a stream."""
    event = backend.record(stream)
    backend.synchronize(event)
    assert backend.query(event)


def assert_bytes(tensor: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(tensor.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float8_e4m3fn, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (2, PAGE_BYTES + 1)])
def test_memory_is_zeroed_and_as_asked_for(backend: DeviceBackend, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    first, second = backend.allocate(shape, dtype), backend.allocate(shape, dtype)
    assert first.shape == shape and first.dtype is dtype and first.is_contiguous()
    assert first.data_ptr() != second.data_ptr()
    assert not first.cpu().view(torch.uint8).any()


def test_limits_are_byte_counts(backend: DeviceBackend) -> None:
    assert backend.free_bytes() > 0 and backend.in_flight_bytes_max > 0


@pytest.mark.parametrize("byte_count", SIZES)
def test_a_copy_is_there_once_its_event_is_complete(backend: DeviceBackend, byte_count: int) -> None:
    source, target = staged(backend, byte_count), backend.allocate((byte_count,), torch.uint8)
    stream = backend.copy_stream(0)
    backend.copy(source, target, stream)
    finish(backend, stream)
    assert_bytes(target, source)


@pytest.mark.parametrize("byte_count", SIZES)
def test_a_copy_leaves_what_is_beside_its_target_alone(backend: DeviceBackend, byte_count: int) -> None:
    source, cells = staged(backend, byte_count + 2), backend.allocate((3, byte_count + 2), torch.uint8)
    stream = backend.copy_stream(0)
    backend.copy(source[1:-1], cells[1, 1:-1], stream)
    finish(backend, stream)
    expected = torch.zeros(3, byte_count + 2, dtype=torch.uint8)
    expected[1, 1:-1] = source[1:-1]
    assert_bytes(cells, expected)


def test_a_copy_of_nothing_is_none(backend: DeviceBackend) -> None:
    source, target = staged(backend, 5), backend.allocate((5,), torch.uint8)
    stream = backend.copy_stream(0)
    backend.copy(source[:0], target[:0], stream)
    finish(backend, stream)
    assert not target.cpu().any()


def test_copies_on_one_stream_happen_in_order(backend: DeviceBackend) -> None:
    byte_count = 3 * PAGE_BYTES + 5
    sources = [staged(backend, byte_count, seed) for seed in range(5)]
    target = backend.allocate((byte_count,), torch.uint8)
    stream = backend.copy_stream(0)
    for source in sources:
        backend.copy(source, target, stream)
    finish(backend, stream)
    assert_bytes(target, sources[-1])


def test_a_stream_waits_for_an_event_of_another(backend: DeviceBackend) -> None:
    large, small = staged(backend, 4 * MIB, 1), staged(backend, 100, 2)
    target = backend.allocate((4 * MIB,), torch.uint8)
    first, second = backend.copy_stream(0), backend.copy_stream(1)
    backend.copy(large, target, first)
    backend.wait(second, backend.record(first))
    backend.copy(small, target[:100], second)
    finish(backend, second)
    assert_bytes(target[:100], small)
    assert_bytes(target[100:], large[100:])


def test_kernels_read_what_a_copy_has_written_and_are_read_before_it_is_overwritten(backend: DeviceBackend) -> None:
    """How a layer buffer is used: filled, read by a kernel, filled again behind it."""
    row_bytes = PAGE_BYTES + 3
    sources = [staged(backend, row_bytes, seed) for seed in range(4)]
    buffer = backend.allocate((2, row_bytes), torch.uint8)
    taken = backend.allocate((len(sources), row_bytes), torch.uint8)
    copies, compute = backend.copy_stream(3), backend.compute_stream()
    for index, source in enumerate(sources):
        backend.copy(source, buffer[1], copies)
        backend.wait(compute, backend.record(copies))
        backend.copy_rows([buffer], [1], [taken], [index])
        backend.wait(copies, backend.record(compute))
    finish(backend, compute)
    assert_bytes(taken, torch.stack([source.clone() for source in sources]))


def test_rows_of_several_tensors_are_copied_by_their_ids(backend: DeviceBackend) -> None:
    contents = [staged(backend, 4 * 10), staged(backend, 4 * 6, 1)]
    sources = [backend.allocate((4, 10), torch.uint8), backend.allocate((4, 3), torch.int16)]
    targets = [backend.allocate((3, 10), torch.uint8), backend.allocate((3, 3), torch.int16)]
    stream = backend.copy_stream(0)
    for content, source in zip(contents, sources, strict=True):
        backend.copy(content, source.view(-1).view(torch.uint8), stream)
    backend.wait(backend.compute_stream(), backend.record(stream))
    backend.copy_rows(sources, [3, 0], targets, [1, 2])
    finish(backend, backend.compute_stream())
    for source, target in zip(sources, targets, strict=True):
        assert_bytes(target[1], source[3].cpu())
        assert_bytes(target[2], source[0].cpu())
        assert not target[0].cpu().view(torch.uint8).any()


def test_an_event_is_complete_after_some_time_and_stays_so(backend: DeviceBackend) -> None:
    source, target = staged(backend, MIB), backend.allocate((MIB,), torch.uint8)
    stream = backend.copy_stream(0)
    backend.copy(source, target, stream)
    event = backend.record(stream)
    for _ in range(10_000_000):
        if backend.query(event):
            break
    assert backend.query(event) and backend.query(event)
    backend.synchronize(event)
    assert_bytes(target, source)


def test_an_event_of_a_stream_with_nothing_in_it_is_complete_and_held_against_nobody(backend: DeviceBackend) -> None:
    for stream in (backend.copy_stream(0), backend.compute_stream()):
        event = backend.record(stream)
        backend.wait(stream, event)
        backend.wait(backend.copy_stream(1), event)
        finish(backend, stream)
    finish(backend, backend.copy_stream(1))


def test_a_link_has_one_stream(backend: DeviceBackend) -> None:
    assert backend.copy_stream(2) is backend.copy_stream(2)


@pytest.mark.parametrize("byte_count", SIZES)
def test_registered_memory_is_read_and_can_be_registered_again(backend: DeviceBackend, byte_count: int) -> None:
    memory = anonymous_tensor((byte_count,), torch.uint8).copy_(random_bits((byte_count,), torch.uint8))
    target = backend.allocate((byte_count,), torch.uint8)
    stream = backend.copy_stream(0)
    for _ in range(2):
        assert backend.register(memory)
        backend.copy(memory, target, stream)
        finish(backend, stream)
        assert_bytes(target, memory)
        backend.unregister(memory)
        memory += 1


def test_any_part_of_registered_memory_may_be_copied(backend: DeviceBackend) -> None:
    rows = anonymous_tensor((5, PAGE_BYTES + 11), torch.uint8).copy_(random_bits((5, PAGE_BYTES + 11), torch.uint8))
    assert backend.register(rows)
    target = backend.allocate((100,), torch.uint8)
    stream = backend.copy_stream(0)
    for row, start in ((0, 0), (3, 1), (4, PAGE_BYTES - 89)):
        backend.copy(rows[row, start : start + 100], target, stream)
        finish(backend, stream)
        assert_bytes(target, rows[row, start : start + 100])
    backend.unregister(rows)


def test_staging_memory_has_the_size_that_was_asked_for_and_is_nobody_elses(backend: DeviceBackend) -> None:
    cells = [backend.stage(byte_count) for byte_count in SIZES]
    for index, (cell, byte_count) in enumerate(zip(cells, SIZES, strict=True)):
        assert cell.shape == (byte_count,) and cell.dtype is torch.uint8 and cell.device.type == "cpu"
        assert cell.untyped_storage().nbytes() == byte_count, "no rounding up"
        cell.fill_(index)
    assert all((cell == index).all() for index, cell in enumerate(cells))
    for cell in cells:
        backend.unregister(cell)


def test_ids_are_int32_on_the_host_and_tensors_go_to_the_device(backend: DeviceBackend) -> None:
    ids = torch.tensor([[3, -1], [1 << 33, 0]])
    routed = backend.route_ids(backend.to_device(ids))
    assert routed.dtype is torch.int32 and routed.is_contiguous() and routed.device.type == "cpu"
    assert routed.tolist() == [[3, -1], [(1 << 31) - 1, 0]]
    assert_bytes(backend.to_device(ids), ids)


def test_kernels_run_in_order_with_what_is_queued_before_and_after(backend: DeviceBackend) -> None:
    source, cell = staged(backend, 100), backend.allocate((1, 100), torch.uint8)
    other = backend.allocate((1, 100), torch.uint8)
    backend.copy(source, cell[0], backend.compute_stream())
    touches = [(cell, [0])], [(other, [0])]
    backend.run("a kernel", lambda: other.copy_(cell), lambda: touches)
    backend.run("another", lambda: cell.zero_(), lambda: ([], [(cell, [0])]))
    finish(backend, backend.compute_stream())
    assert_bytes(other[0], source)
    assert not cell.any()


def test_nothing_is_captured_unless_somebody_captures(backend: DeviceBackend) -> None:
    assert backend.is_capturing() is False
    assert isinstance(backend.can_look_up, bool)


def test_words_are_read_and_written_by_both_sides(backend: DeviceBackend) -> None:
    words = backend.stage(4 * 8).view(torch.int64).zero_()
    before = backend.read_words(words)
    backend.write_word(words, 2, (1 << 62) + 5)
    seen = backend.allocate((4,), torch.int64)
    backend.run("a reader", lambda: seen.copy_(words), lambda: ([], [(seen.view(1, 4), [0])]))
    finish(backend, backend.compute_stream())
    assert seen.tolist() == backend.read_words(words).tolist() == [0, 0, (1 << 62) + 5, 0]
    assert before.tolist() == [0, 0, 0, 0], "what was read is a copy"


def test_a_thread_that_was_adopted_copies_and_no_other_thread_is_moved(backend: DeviceBackend) -> None:
    own = os.sched_getaffinity(0)
    source, target = staged(backend, 1000), backend.allocate((1000,), torch.uint8)

    def work() -> None:
        backend.adopt_thread()
        assert os.sched_getaffinity(0) <= own
        stream = backend.copy_stream(0)
        backend.copy(source, target, stream)
        finish(backend, stream)

    failures: list[BaseException] = []
    run_in_thread(work, failures)
    assert not failures
    assert os.sched_getaffinity(0) == own
    assert_bytes(target, source)


def run_in_thread(work: Callable[[], None], failures: list[BaseException]) -> None:
    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  the test fails with it
            failures.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()


def test_the_suite_asks_every_backend_that_there_is() -> None:
    modules = {path.stem for path in Path(cuda.__file__).parent.glob("[a-z]*.py")}
    parts = {"base", "make", "pinning", "modelled_parts", "modelled_order"}
    assert modules - parts == {name.partition("-")[0] for name in FACTORIES}
