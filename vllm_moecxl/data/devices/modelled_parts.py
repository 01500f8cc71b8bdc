"""What the modelled accelerator is made of: memory, operations on it, and the streams that they are queued on."""

from __future__ import annotations

import ctypes
import math
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from typing import final

import torch

from vllm_moecxl.data.devices.base import Event, Stream, Touches

#: See `Memory.accesses_max`; more where more are of interest at the same time.
_ACCESSES_KEPT = 16


class _Buffer(bytearray):
    """Bytes that tell by a weak reference when the last tensor on them is gone."""

    __slots__ = ("__weakref__",)


class Memory:
    """Memory that operations touch: an allocation on the device, staging cells, or registered host memory.

    Attributes:
        name: for messages.
        base, byte_count: its addresses.
        row_bytes: of one cell, for messages.
        holder: gives what keeps the bytes alive; None once an allocation of the device is gone.
        written: per byte whether anything was written there; empty for host memory.
        accesses: operations that touched it, as (operation, start, stop, whether it wrote); those that the host knows
            to have ended may be missing.
        accesses_max: how many of them are kept without looking which are of no interest any more.
    """

    __slots__ = (
        *("accesses", "accesses_max", "base", "byte_count", "holder", "is_device", "name", "row_bytes", "written"),
    )

    def __init__(self, name: str, tensor: torch.Tensor, holder: Callable[[], object], *, is_device: bool) -> None:
        self.name = name
        self.base = tensor.data_ptr()
        self.byte_count = tensor.nbytes
        self.row_bytes = tensor.nbytes // tensor.shape[0] if tensor.dim() > 1 else tensor.nbytes
        self.holder = holder
        self.is_device = is_device
        self.written = bytearray(tensor.nbytes if is_device else 0)
        self.accesses: list[tuple[Operation, int, int, bool]] = []
        self.accesses_max = _ACCESSES_KEPT

    def cell(self, start: int, stop: int) -> str:
        """Bytes of it, in words."""
        row_id, offset = divmod(start, self.row_bytes)
        return f"{self.name}, row {row_id}, bytes {offset} to {offset + stop - start}"

    def is_poisoned(self, start: int, stop: int) -> bool:
        """Whether some of these bytes were never written."""
        return self.is_device and self.written.find(0, start, stop) >= 0

    def read(self, start: int, stop: int) -> bytes:
        return ctypes.string_at(self.base + start, stop - start)

    def write(self, start: int, content: bytes) -> None:
        ctypes.memmove(self.base + start, content, len(content))
        self.mark_written(start, start + len(content))

    def mark_written(self, start: int, stop: int) -> None:
        """Note that something was written to these bytes of the device."""
        self.written[start:stop] = b"\1" * (stop - start)


#: (memory, start, stop): bytes of it.
Region = tuple[Memory, int, int]


class MemoryMap:
    """All memory that the device knows of, by address."""

    def __init__(self) -> None:
        self._memories: list[Memory] = []
        self._bases: list[int] = []

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the device, zeros as far as torch sees, which ends with the last tensor on it."""
        buffer = _Buffer(math.prod(shape) * dtype.itemsize)
        tensor = torch.frombuffer(buffer, dtype=dtype).view(*shape)
        self._add(Memory(f"allocation {len(self._memories)}", tensor, weakref.ref(buffer), is_device=True))
        return tensor

    def add_host(self, name: str, tensor: torch.Tensor) -> None:
        """Host memory that copies may read, until it is removed."""
        self._add(Memory(f"{name} {len(self._memories)}", tensor, lambda: tensor, is_device=False))

    def remove(self, memory: Memory) -> None:
        self._memories.remove(memory)
        self._index()

    def all(self) -> list[Memory]:
        """What is there now."""
        self._index()
        return self._memories

    def region(self, address: int, byte_count: int) -> Region | None:
        """Where these bytes are; None unless they are in one piece of memory."""
        index = bisect_right(self._bases, address) - 1
        if index < 0:
            return None
        memory = self._memories[index]
        start = address - memory.base
        return (memory, start, start + byte_count) if start + byte_count <= memory.byte_count else None

    def _add(self, memory: Memory) -> None:
        self._memories.append(memory)
        self._index()

    def _index(self) -> None:
        """Sort what is alive by address: the addresses of what is gone may come again."""
        self._memories = sorted((one for one in self._memories if one.holder() is not None), key=lambda one: one.base)
        self._bases = [memory.base for memory in self._memories]


@final
class Operation:
    """A copy or a kernel. It reads and writes at any time between its start and its end.

    Attributes:
        name: for messages.
        stream: where it is queued.
        reads, writes: what it touches.
        act: its effect.
        keep: tensors that have to stay until it has ended.
        touches: says, when it starts, what it reads and writes, where that is not known before.
        snapshot: of a copy from the host, what its source held when it was queued; it has to hold that to the end.
        position: its number on its stream, from 1 on.
        clock: per stream, how many operations are known to end before it starts.
        words_read, words_written: words that it shares with the host.
    """

    __slots__ = (
        *("act", "clock", "is_ended", "is_running", "keep", "name", "position", "reads", "snapshot", "stream"),
        *("touches", "words_read", "words_written", "writes"),
    )

    def __init__(
        self,
        name: str,
        stream: ModelledStream,
        reads: list[Region],
        writes: list[Region],
        act: Callable[[], None],
        keep: tuple[torch.Tensor, ...] = (),
        touches: Callable[[], Touches] | None = None,
    ) -> None:
        self.name = name
        self.stream = stream
        self.reads = reads
        self.writes = writes
        self.act = act
        self.keep = keep
        self.touches = touches
        self.snapshot = b""
        self.position = 0
        self.clock: list[int] = []
        self.words_read: list[Region] = []
        self.words_written: list[Region] = []
        self.is_running = False
        self.is_ended = False

    def __str__(self) -> str:
        return f"{self.name} (number {self.position} on the {self.stream.name} stream)"

    def what_it_touches(self) -> str:
        """Its regions, in words."""
        cells = [f"reads {memory.cell(*span)}" for memory, *span in self.reads]
        cells += [f"writes {memory.cell(*span)}" for memory, *span in self.writes]
        return f"{self}: {'; '.join(cells)}"


class ModelledStream(Stream):
    """A queue of operations, events to complete and events to wait for.

    Attributes:
        clock: per stream, how many of its operations are known to end before what is queued here next.
        learned: what operations that have run here learned from words, of which nobody knew when they were queued.
    """

    def __init__(self, name: str, actor: int) -> None:
        self.name = name
        self.actor = actor
        self.clock = [0] * (actor - 1)
        self.learned: list[int] = []
        self.queue: deque[Operation | ModelledEvent | Wait] = deque()


@final
class ModelledEvent(Event):
    """A point in a stream; complete when all before it has ended."""

    def __init__(self, clock: list[int]) -> None:
        self.clock = clock
        self.is_complete = False


@final
class Wait:
    """A stream's wait for an event."""

    __slots__ = ("event",)

    def __init__(self, event: ModelledEvent) -> None:
        self.event = event


def clash(some: Sequence[Region], others: Sequence[Region]) -> str:
    """A cell that is in both, in words; empty where there is none."""
    for memory, start, stop in some:
        for other_memory, other_start, other_stop in others:
            if memory is other_memory and start < other_stop and other_start < stop:
                return memory.cell(max(start, other_start), min(stop, other_stop))
    return ""
