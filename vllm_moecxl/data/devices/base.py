"""What the runtime asks of a compute device: memory, copies into it, and the order of copies and kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy.typing as npt
import torch

#: Rows of tensors that kernels touch: ([rows, ...] tensor, ids of its rows).
Rows = Sequence[tuple[torch.Tensor, Iterable[int]]]
#: What kernels read, and what they write.
Touches = tuple[Rows, Rows]


class Stream:
    """A queue of device work, done in order."""


class Event:
    """A point in a stream; complete when all work before it is done."""


class DeviceBackend(Protocol):
    """What the runtime asks of a compute device.

    Copies run beside the kernels; nothing orders the two but events:

    - The lease on a slot ends when the event behind the kernel that reads it is complete, as the host sees it. A slot
      is only written while nobody holds it, so a fill waits for nothing; the kernel waits (`wait`) for the event behind
      the fill.
    - A layer buffer is written by copies that wait for the event behind the last kernel that reads it.
    - Host memory that a copy reads stays as it is until the event behind the copy is complete; the backend itself keeps
      it, and the target, from being freed until then.

    Each method may be called from any thread.

    Attributes:
        is_host: whether the device's memory is the host's: kernels can read homes, and a copy is done when `copy`
            returns.
        in_flight_bytes_max: bytes that may be queued to be copied, on all streams together.
        can_look_up: whether kernels of ours run there that read registered host memory at the host's own addresses: the
            device can look experts up, and fetch them, by itself.
    """

    is_host: bool
    in_flight_bytes_max: int
    can_look_up: bool

    def compute_stream(self) -> Stream:
        """Where the kernels of the calling thread run."""

    def copy_stream(self, link_id: int) -> Stream:
        """The stream for copies from one bank, made at its first use."""

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A zeroed tensor on the device: a cell that was never filled holds zeros, not somebody's bytes.

        It is zeroed when this returns: a copy on any stream may follow.
        """

    def allocate_tail(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Like `allocate`, for rows that other tensors shall end with."""

    def allocate_before(self, row_count: int, tail: torch.Tensor) -> torch.Tensor | None:
        """A zeroed [rows + tail rows, ...] tensor whose last rows are those of `tail`, the same memory.

        So a kernel that is given one tensor reads a layer's own slots and what all layers share.

        Args:
            tail: as `allocate_tail` gave it.

        Returns:
            None where the device cannot map memory twice.
        """

    def free_bytes(self) -> int:
        """Device memory that may still be allocated."""

    def register(self, memory: torch.Tensor) -> bool:
        """Make host memory such that copies may read it asynchronously from now on.

        Args:
            memory: contiguous, with its pages to itself; kept until `unregister`.

        Returns:
            False: it cannot be, copies have to go through `stage`. Then nothing has changed, except perhaps where its
            pages are.
        """

    def unregister(self, memory: torch.Tensor) -> None:
        """Undo `register` or `stage`. Copies that read the memory have ended by then."""

    def stage(self, byte_count: int) -> torch.Tensor:
        """A [byte_count] uint8 host tensor that copies may read asynchronously; kept until `unregister`.

        Raises:
            CapacityError: the device does not take that much host memory.
        """

    def copy(self, source: torch.Tensor, target: torch.Tensor, stream: Stream) -> None:
        """Queue a copy from the host to the device.

        Args:
            source, target: 1-D uint8, contiguous, of the same size; `source` on the host, registered or staged unless
                the device's memory is the host's.
        """

    def copy_rows(
        self,
        sources: Sequence[torch.Tensor],
        source_ids: Sequence[int],
        targets: Sequence[torch.Tensor],
        target_ids: Sequence[int],
    ) -> None:
        """Queue on the compute stream, for each pair of tensors and ids: ``target[target_id] = source[source_id]``.

        Args:
            sources, targets: [rows, ...] tensors on the device, contiguous.
        """

    def run(self, name: str, work: Callable[[], None], touches: Callable[[], Touches]) -> None:
        """Queue kernels on the compute stream.

        Args:
            name: for messages.
            work: launches them.
            touches: what they read and write, as the device knows it when they run; asked only by who checks it.
        """

    def is_capturing(self) -> bool:
        """Whether what is queued on the compute stream now is captured in a graph, to be run later and often."""

    def read_words(self, words: torch.Tensor) -> npt.NDArray[Any]:
        """A copy of staged memory that kernels write: each word whole, and whatever they wrote by now."""

    def write_word(self, words: torch.Tensor, index: int, word: int) -> None:
        """Write a word of staged memory that kernels read, at once. What this thread saw before happens before it."""

    def record(self, stream: Stream) -> Event:
        """An event behind all that is queued on a stream by now."""

    def wait(self, stream: Stream, event: Event) -> None:
        """What is queued on the stream from now on runs after the event. Does not block the host."""

    def query(self, event: Event) -> bool:
        """Whether an event is complete."""

    def synchronize(self, event: Event) -> None:
        """Block the calling thread until an event is complete."""

    def route_ids(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """The router's ids as a contiguous int32 host tensor."""

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host tensor on the device."""

    def adopt_thread(self) -> None:
        """Called first of all in each thread that copies: put it where it is near the memory and beside the kernels."""


class HostWords:
    """How words of staged memory are read and written where the host sees the device's memory accesses in order."""

    @staticmethod
    def read_words(words: torch.Tensor) -> npt.NDArray[Any]:
        """See `DeviceBackend.read_words`."""
        return words.numpy().copy()

    @staticmethod
    def write_word(words: torch.Tensor, index: int, word: int) -> None:
        """See `DeviceBackend.write_word`."""
        words.numpy()[index] = word


def check_copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """What `DeviceBackend.copy` demands of its arguments."""
    assert source.dim() == target.dim() == 1 and source.dtype is target.dtype is torch.uint8
    assert source.nbytes == target.nbytes and source.is_contiguous() and target.is_contiguous()


def to_int32(ids: torch.Tensor) -> torch.Tensor:
    """Ids of any integer type as int32; one that is too wide stays out of every layer's range."""
    if ids.dtype is torch.int64:
        ids = ids.clamp(-1, torch.iinfo(torch.int32).max)
    return ids.to(torch.int32)
