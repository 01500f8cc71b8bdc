"""The backend of CUDA devices: slots in device memory, copies on streams of their own.

Not run on a GPU by us. What is taken from others: torch sees memory of `cudaHostRegister` as pinned (`is_pinned` asks
the runtime about the pointer) and copies from it at the link's full rate, which DeepSpeed measured on an H200
(https://github.com/deepspeedai/DeepSpeed/pull/8283); a copy with `non_blocking` is one `cudaMemcpyAsync` on the current
stream (aten/src/ATen/native/cuda/Copy.cu). What nobody has checked yet: that registering leaves pages where they are,
for which data/registration.py asks the kernel each time.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from moecxl_kernels.host import copy_rows

from vllm_moecxl.data.devices.base import Event, HostWords, Stream, Touches, check_copy, to_int32
from vllm_moecxl.data.devices.pinning import PinnedMemory
from vllm_moecxl.data.host import anonymous_tensor
from vllm_moecxl.errors import CapacityError
from vllm_moecxl.linux import affinity
from vllm_moecxl.units import KIB, MIB, format_bytes

if TYPE_CHECKING:  # it needs Triton
    from moecxl_kernels.gather import SlabMap

#: Most of it has no annotations.
_cuda: Any = torch.cuda

#: More than a millisecond of PCIe 5.0 x16, so that the link never runs dry; a demand waits no longer than that behind
#: what was queued before it. By arithmetic, not measured.
_IN_FLIGHT_BYTES_MAX = 64 * MIB
#: Rows that are shorter are copied on the device by one kernel, all that a call has of them; longer ones by a memory
#: copy each. Source: published for reads of host memory by an H100 with PCIe 5, not measured for the device's own;
#: re-measure with `python -m benchmarks copy`.
COPY_ENGINE_MIN_BYTES = 28 * KIB
#: Programs of that kernel: more than most devices have multiprocessors. By arithmetic, not measured.
_ROW_PROGRAM_COUNT = 256
#: CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM of the driver's interface.
_CAN_USE_HOST_POINTER = 91
#: Copies on a stream between two marks of ours, where nobody records events.
_UNMARKED_COUNT_MAX = 64


class CudaStream(Stream):
    """A stream of torch's, and the tensors that copies on it may still touch."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self._lock = threading.Lock()
        self._unmarked: list[torch.Tensor] = []
        self._marked: deque[tuple[Any, list[torch.Tensor]]] = deque()

    def keep(self, *tensors: torch.Tensor) -> None:
        """Keep what was just queued to be copied from being freed.

        torch's allocators keep only memory of their own, and only for streams that they were told of.
        """
        with self._lock:
            self._unmarked += tensors
            is_due = len(self._unmarked) >= _UNMARKED_COUNT_MAX * len(tensors)
        if is_due:
            self.mark()

    def mark(self) -> Any:
        """An event behind everything; what is kept for what is done by now is let go."""
        # Waiting for it spins, which lets go of the interpreter and wakes sooner than sleeping would.
        event = _cuda.Event()
        with self._lock:
            event.record(self.stream)
            if self._unmarked:
                self._marked.append((event, self._unmarked))
                self._unmarked = []
            while self._marked and self._marked[0][0].query():
                self._marked.popleft()
        return event


class CudaEvent(Event):
    """An event of torch's."""

    def __init__(self, event: Any) -> None:
        self.event = event


class CudaBackend(HostWords):
    """See `DeviceBackend`. Registered and staged memory is given back when the backend is gone."""

    is_host = False
    in_flight_bytes_max = _IN_FLIGHT_BYTES_MAX

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", _cuda.current_device()) if device.index is None else device
        self.can_look_up = _uses_host_addresses(self._device)
        self._lock = threading.Lock()
        self._copy_streams: dict[int, CudaStream] = {}
        #: Of short rows, by their addresses and sizes: a layer's slots and the layer buffers stay where they are.
        self._row_maps: dict[tuple[tuple[int, ...], ...], SlabMap] = {}
        # However much: NVIDIA's driver does not check RLIMIT_MEMLOCK, which most containers keep small.
        self._pinned = PinnedMemory(partial(_pin, self._device), partial(_unpin, self._device))
        #: Runs once: when called, or when this object or the process ends.
        self._end = weakref.finalize(self, _give_back, self._device, self._pinned)

    def compute_stream(self) -> Stream:
        return CudaStream(_cuda.current_stream(self._device))

    def copy_stream(self, link_id: int) -> Stream:
        with self._lock:
            if link_id not in self._copy_streams:
                # One that does not wait for the default stream, as all of torch's but that.
                self._copy_streams[link_id] = CudaStream(_cuda.Stream(self._device))
            return self._copy_streams[link_id]

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.zeros(tuple(shape), dtype=dtype, device=self._device)
        # A copy on another stream must not be overtaken by the zeros.
        _cuda.current_stream(self._device).synchronize()
        return tensor

    def allocate_tail(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self.allocate(shape, dtype)

    def allocate_before(self, row_count: int, tail: torch.Tensor) -> torch.Tensor | None:
        return None

    def free_bytes(self) -> int:
        return int(_cuda.mem_get_info(self._device)[0])

    def register(self, memory: torch.Tensor) -> bool:
        return self._pinned.add(memory)

    def unregister(self, memory: torch.Tensor) -> None:
        self._pinned.remove(memory)

    def stage(self, byte_count: int) -> torch.Tensor:
        # Not from torch's pinned allocator, which rounds up to powers of two.
        tensor = anonymous_tensor((byte_count,), torch.uint8)
        if not self._pinned.add(tensor):
            raise CapacityError(
                f"the CUDA driver refuses to register {format_bytes(byte_count)} of host memory for staging: free host "
                "memory"
            )
        return tensor

    def copy(self, source: torch.Tensor, target: torch.Tensor, stream: Stream) -> None:
        assert isinstance(stream, CudaStream)
        check_copy(source, target)
        with _cuda.stream(stream.stream):
            for start, stop in self._pinned.parts(source.data_ptr(), source.nbytes):
                target[start:stop].copy_(source[start:stop], non_blocking=True)
        stream.keep(source, target)

    def copy_rows(
        self,
        sources: Sequence[torch.Tensor],
        source_ids: Sequence[int],
        targets: Sequence[torch.Tensor],
        target_ids: Sequence[int],
    ) -> None:
        pairs = list(zip(sources, targets, strict=True))
        short = [pair for pair in pairs if _row_bytes(pair[0]) < COPY_ENGINE_MIN_BYTES]
        long = [pair for pair in pairs if _row_bytes(pair[0]) >= COPY_ENGINE_MIN_BYTES]
        copy_rows([source for source, _ in long], source_ids, [target for _, target in long], target_ids)
        if short and source_ids:
            self._gather_rows(short, source_ids, target_ids)

    def _gather_rows(
        self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], source_ids: Sequence[int], target_ids: Sequence[int]
    ) -> None:
        """As `copy_rows`, in one launch."""
        from moecxl_kernels.gather import gather_slabs

        assert max(source_ids) < min(len(source) for source, _ in pairs)
        assert max(target_ids) < min(len(target) for _, target in pairs)
        ids = [one for both in zip(source_ids, target_ids, strict=True) for one in both]
        # Waits for what is queued, which whoever copies rows has done before: it has asked for the routed ids.
        words = self.to_device(torch.tensor([len(source_ids), *ids], dtype=torch.int32))
        gather_slabs(words[1:].view(-1, 2), words[:1], self._row_map(pairs), _ROW_PROGRAM_COUNT)

    def _row_map(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> SlabMap:
        from moecxl_kernels.gather import slab_map

        key = tuple((source.data_ptr(), target.data_ptr(), len(source), _row_bytes(source)) for source, target in pairs)
        if key not in self._row_maps:
            sizes = [_row_bytes(source) for source, _ in pairs]
            rows = [
                [source.data_ptr() + row * size for (source, _), size in zip(pairs, sizes, strict=True)]
                for row in range(min(len(source) for source, _ in pairs))
            ]
            self._row_maps[key] = slab_map(rows, [target.data_ptr() for _, target in pairs], sizes, sizes, self._device)
        return self._row_maps[key]

    def run(self, name: str, work: Callable[[], None], touches: Callable[[], Touches]) -> None:
        work()

    def is_capturing(self) -> bool:
        return bool(_cuda.is_current_stream_capturing())

    def record(self, stream: Stream) -> Event:
        assert isinstance(stream, CudaStream)
        return CudaEvent(stream.mark())

    def wait(self, stream: Stream, event: Event) -> None:
        assert isinstance(stream, CudaStream) and isinstance(event, CudaEvent)
        stream.stream.wait_event(event.event)

    def query(self, event: Event) -> bool:
        assert isinstance(event, CudaEvent)
        return bool(event.event.query())

    def synchronize(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        event.event.synchronize()

    def route_ids(self, topk_ids: torch.Tensor) -> torch.Tensor:
        return to_int32(topk_ids.to("cpu")).contiguous()

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device)

    def adopt_thread(self) -> None:
        _cuda.set_device(self._device)
        place = _cuda.get_device_properties(self._device)
        affinity.use_cpus_near(f"{place.pci_domain_id:04x}:{place.pci_bus_id:02x}:{place.pci_device_id:02x}.0")


def _row_bytes(tensor: torch.Tensor) -> int:
    """Bytes of one row of a [rows, ...] tensor."""
    return tensor.nbytes // len(tensor)


def _uses_host_addresses(device: torch.device) -> bool:
    """Whether kernels read registered memory at the host's own addresses, as nearly every device does."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    answer = ctypes.c_int()
    code = driver.cuDeviceGetAttribute(ctypes.byref(answer), _CAN_USE_HOST_POINTER, device.index)
    return code == 0 and answer.value == 1


def _pin(device: torch.device, address: int, byte_count: int) -> int:
    with _cuda.device(device):
        code = int(_cuda.cudart().cudaHostRegister(address, byte_count, 0))
        if code:
            # The runtime keeps the refusal for whoever asks next, which is the check behind torch's next kernel.
            with suppress(RuntimeError):
                torch.ones(1, device=device)
    return code


def _unpin(device: torch.device, address: int) -> None:
    with _cuda.device(device):
        code = int(_cuda.cudart().cudaHostUnregister(address))
    assert not code, f"cudaHostUnregister: error {code}"


def _give_back(device: torch.device, pinned: PinnedMemory) -> None:
    if pinned.pinned_bytes:
        _cuda.synchronize(device)
        pinned.clear()
