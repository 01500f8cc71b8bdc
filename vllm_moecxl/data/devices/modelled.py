"""The modelled accelerator: streams that run in every order that stream and event semantics allow.

It stands in for a device of its own where there is none, to find races between copies, kernels and the host. A stream
runs its operations in order, one at a time; operations of different streams overlap, unless an event orders them. Who
steps next, a stream or the host, is asked of a `Chooser`, so that a search can go through the schedules and replay one.

The device moves only where the host could notice: in `query` and `read_words` as far as the chooser likes, in
`synchronize` and `route_ids` as far as it must. That leaves no schedule out: a step that comes earlier, between two
other calls of the host, could as well come at the next such point, and nobody would see a difference.

Two kinds of checks. What *strikes* in the schedule at hand: bytes that are read before they were written, operations
that overlap in time and in memory, a source that the host overwrote before its copy had ended, and whatever a kernel
finds wrong in its rows. And what is *unordered*: two operations of which neither is known to end before the other
starts, in which case some schedule strikes even if this one does not. The latter is read off vector clocks; see
`modelled_order`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, Protocol

import numpy.typing as npt
import torch

from vllm_moecxl.data.devices.base import Event, Rows, Stream, Touches, check_copy, to_int32
from vllm_moecxl.data.devices.modelled_order import Order, merge
from vllm_moecxl.data.devices.modelled_parts import (
    MemoryMap,
    ModelledEvent,
    ModelledStream,
    Operation,
    Region,
    Wait,
    clash,
)

#: The host among the actors that a chooser chooses from; the others are streams.
HOST = 0


class Violation(AssertionError):
    """Two operations, or an operation and the host, did to some bytes what a device would not forgive."""


class Chooser(Protocol):
    """Who decides the order in which things happen."""

    def choose(self, actors: Sequence[int]) -> int:
        """Index into `actors`, which are two or more in rising order, of the one that steps next."""


class ModelledBackend:
    """A `DeviceBackend` whose device is a model. For one thread.

    Args:
        chooser: decides the order.
        may_register: whether some host memory can be registered.
        checks_order: also report what is unordered; else only what strikes.
        patience: how often in a row the chooser may send the host on from `query` while the device could step. A host
            that polls would otherwise make schedules without end.
        trace: gets a line for each step.

    Attributes:
        violation: the first that was found, in case somebody took the exception for a failing bank.
    """

    is_host = False
    can_look_up = True

    def __init__(
        self,
        chooser: Chooser,
        *,
        may_register: Callable[[torch.Tensor], bool] = lambda _: True,
        checks_order: bool = True,
        capacity_bytes: int = 1 << 30,
        in_flight_bytes_max: int = 1 << 30,
        patience: int = 8,
        trace: list[str] | None = None,
    ) -> None:
        self.in_flight_bytes_max = in_flight_bytes_max
        self.violation: Violation | None = None
        self._chooser = chooser
        self._may_register = may_register
        self._capacity_bytes = capacity_bytes
        self._patience = patience
        self._patience_left = patience
        self._trace = trace
        self._memory = MemoryMap()
        self._running: list[Operation] = []
        self._order = Order(is_checked=checks_order)
        self._streams: list[ModelledStream] = []
        self._copy_streams: dict[int, ModelledStream] = {}
        self._compute = self._new_stream("compute")

    # The protocol.

    def compute_stream(self) -> ModelledStream:
        return self._compute

    def copy_stream(self, link_id: int) -> ModelledStream:
        stream = self._copy_streams.get(link_id)
        if stream is None:
            stream = self._copy_streams[link_id] = self._new_stream(f"link {link_id}")
        return stream

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._memory.allocate(shape, dtype)

    def allocate_tail(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self.allocate(shape, dtype)

    def allocate_before(self, row_count: int, tail: torch.Tensor) -> torch.Tensor | None:
        return None

    def free_bytes(self) -> int:
        return self._capacity_bytes - sum(one.byte_count for one in self._memory.all() if one.is_device)

    def register(self, memory: torch.Tensor) -> bool:
        if not self._may_register(memory):
            return False
        if self._memory.region(memory.data_ptr(), memory.nbytes) is not None:
            self._fail(f"{memory.nbytes} bytes of host memory are registered twice")
        self._memory.add_host("registered memory", memory)
        return True

    def stage(self, byte_count: int) -> torch.Tensor:
        cell = torch.zeros(byte_count, dtype=torch.uint8)
        self._memory.add_host("staging cell", cell)
        return cell

    def unregister(self, memory: torch.Tensor) -> None:
        region = self._memory.region(memory.data_ptr(), memory.nbytes)
        if region is None or region[0].is_device or region[0].byte_count != memory.nbytes:
            self._fail(f"{memory.nbytes} bytes of host memory are unregistered, which nobody registered or staged")
        found = region[0]
        for operation, start, stop, _ in found.accesses:
            if not self._order.is_known_to_host(operation):
                self._fail(f"{found.cell(start, stop)} is unregistered before {operation} is known to have ended")
        self._memory.remove(found)

    def copy(self, source: torch.Tensor, target: torch.Tensor, stream: Stream) -> None:
        assert isinstance(stream, ModelledStream)
        check_copy(source, target)
        byte_count = source.numel()
        if not byte_count:
            return
        read = self._region(source.data_ptr(), byte_count, "the source of a copy", is_device=False)
        memory, start, _ = write = self._region(target.data_ptr(), byte_count, "the target of a copy", is_device=True)
        snapshot = read[0].read(*read[1:])
        keep = (source, target)
        operation = Operation("copy", stream, [read], [write], lambda: memory.write(start, snapshot), keep)
        operation.snapshot = snapshot
        self._submit(operation)

    def copy_rows(
        self,
        sources: Sequence[torch.Tensor],
        source_ids: Sequence[int],
        targets: Sequence[torch.Tensor],
        target_ids: Sequence[int],
    ) -> None:
        assert len(sources) == len(targets) and len(source_ids) == len(target_ids)
        reads = [region for source in sources for region in self._device_rows(source, source_ids)]
        writes = [region for target in targets for region in self._device_rows(target, target_ids)]
        assert all(read[2] - read[1] == write[2] - write[1] for read, write in zip(reads, writes, strict=True))

        def act() -> None:
            for (source, *span), (target, start, _) in zip(reads, writes, strict=True):
                target.write(start, source.read(*span))

        if reads:
            self._submit(Operation("copy of rows", self._compute, reads, writes, act, (*sources, *targets)))

    def run(self, name: str, work: Callable[[], None], touches: Callable[[], Touches]) -> None:
        """See `DeviceBackend.run`; `touches` is asked when the kernels start, `work` is called when they end.

        Host memory that they write are words, which the host reads with `read_words` while they run; so are those that
        it writes with `write_word`. Who reads a word knows what its writer knew, if the kernels list it, a row for each
        word: leave out those that nobody shall learn from. What kernels learn holds for what runs after them.
        """
        self.run_on(self._compute, name, work, touches)

    def is_capturing(self) -> bool:
        return False

    def read_words(self, words: torch.Tensor) -> npt.NDArray[Any]:
        self._let_run(None)
        self._order.host_reads(range(words.data_ptr(), words.data_ptr() + words.nbytes, words.itemsize))
        return words.numpy().copy()

    def write_word(self, words: torch.Tensor, index: int, word: int) -> None:
        words.numpy()[index] = word
        self._order.host_writes(words.data_ptr() + index * words.itemsize)

    def record(self, stream: Stream) -> ModelledEvent:
        assert isinstance(stream, ModelledStream)
        merge(stream.clock, self._order.host_clock)
        event = ModelledEvent(stream.clock.copy())
        stream.queue.append(event)
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        assert isinstance(stream, ModelledStream) and isinstance(event, ModelledEvent)
        merge(stream.clock, event.clock)
        stream.queue.append(Wait(event))

    def query(self, event: Event) -> bool:
        assert isinstance(event, ModelledEvent)
        self._let_run(event)
        if event.is_complete:
            merge(self._order.host_clock, event.clock)
        return event.is_complete

    def synchronize(self, event: Event) -> None:
        assert isinstance(event, ModelledEvent)
        while (ready := self._ready()) and not event.is_complete:
            self._step(self._streams[self._chosen([stream.actor for stream in ready]) - 1])
        assert event.is_complete, "an event is waited for that nobody recorded here"
        merge(self._order.host_clock, event.clock)

    def route_ids(self, topk_ids: torch.Tensor) -> torch.Tensor:
        # The ids come from a kernel: the host waits for all that was queued before, as for any tensor that it reads.
        self.synchronize(self.record(self._compute))
        return to_int32(topk_ids).contiguous()

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def adopt_thread(self) -> None:
        pass

    # What a harness asks beside it.

    def launch(
        self, name: str, reads: Sequence[tuple[torch.Tensor, Iterable[int]]], check: Callable[[], None] = lambda: None
    ) -> None:
        """Queue a kernel on the compute stream.

        Args:
            name: for messages.
            reads: [rows, ...] device tensors, and the rows of each that it reads.
            check: looks at these rows when the kernel runs; raises what `violate` gives where they are wrong.
        """
        regions = [region for tensor, row_ids in reads for region in self._device_rows(tensor, row_ids)]
        self._submit(Operation(name, self._compute, regions, [], check, tuple(tensor for tensor, _ in reads)))

    def run_on(
        self, stream: ModelledStream, name: str, work: Callable[[], None], touches: Callable[[], Touches]
    ) -> None:
        """See `run`, on any stream."""
        self._submit(Operation(name, stream, [], [], work, touches=touches))

    def label(self, tensor: torch.Tensor, name: str) -> None:
        """Give device or staging memory a name for messages."""
        region = self._memory.region(tensor.data_ptr(), tensor.nbytes)
        assert region is not None
        region[0].name = name

    def finish(self) -> None:
        """Run all that is queued.

        Raises:
            Violation: the first that was found, here or before.
        """
        if self.violation is None:
            for stream in self._streams:
                self.synchronize(self.record(stream))
            for memory in self._memory.all():
                memory.accesses.clear()
        if self.violation is not None:
            raise self.violation

    def violate(self, message: str) -> Violation:
        """A violation, noted; to be raised."""
        violation = Violation(message)
        self.violation = self.violation or violation
        return violation

    # Time.

    def _let_run(self, event: ModelledEvent | None) -> None:
        """The host looks: let the device go on as far as the chooser likes, but not beyond an event."""
        while (ready := self._ready()) and not (event is not None and event.is_complete):
            actors = [stream.actor for stream in ready]
            if self._patience_left:
                actors.insert(0, HOST)
            actor = self._chosen(actors)
            if actor == HOST:
                self._patience_left -= 1
                return
            self._step(self._streams[actor - 1])

    def _ready(self) -> list[ModelledStream]:
        """Streams whose next entry is an operation; events that are reached are complete afterwards."""
        ready: list[ModelledStream] = []
        is_settled = False
        while not is_settled:
            is_settled = True
            is_blocked = False
            ready.clear()
            for stream in self._streams:
                queue = stream.queue
                while queue:
                    head = queue[0]
                    if type(head) is Operation:
                        ready.append(stream)
                        break
                    if type(head) is ModelledEvent:
                        head.is_complete = True
                        merge(head.clock, stream.learned)
                        is_settled = not is_blocked
                    elif not head.event.is_complete:
                        is_blocked = True
                        break
                    else:
                        merge(stream.learned, head.event.clock)
                    queue.popleft()
        return ready

    def _chosen(self, actors: list[int]) -> int:
        return actors[0] if len(actors) == 1 else actors[self._chooser.choose(actors)]

    def _step(self, stream: ModelledStream) -> None:
        """Start or end the operation at the head of a stream."""
        self._patience_left = self._patience
        operation = stream.queue[0]
        assert isinstance(operation, Operation)
        if self._trace is not None:
            self._trace.append(f"{'end' if operation.is_running else 'start'}: {operation}")
        if operation.is_running:
            self._running.remove(operation)
            self._end(operation)
            operation.is_ended = True
            stream.queue.popleft()
        else:
            self._start(operation)
            operation.is_running = True
            self._running.append(operation)

    def _start(self, operation: Operation) -> None:
        if operation.touches is not None:
            self._locate(operation, *operation.touches())
        for memory, start, stop in operation.reads:
            if memory.is_poisoned(start, stop):
                self._fail(f"{operation} reads {memory.cell(start, stop)}, where nothing was written yet")
        for other in self._running:
            if cell := clash(operation.writes, other.writes) or clash(operation.reads, other.writes):
                self._fail(f"{operation} starts while {other} still writes {cell}")
            if cell := clash(operation.writes, other.reads):
                self._fail(f"{operation} overwrites {cell} while {other} still reads it")

    def _end(self, operation: Operation) -> None:
        if operation.snapshot:
            memory, *span = operation.reads[0]
            if memory.read(*span) != operation.snapshot:
                self._fail(f"{memory.cell(*span)} was overwritten by the host before {operation} had ended")
        words = [memory.read(*span) for memory, *span in operation.words_written]
        try:
            operation.act()
        except Violation as violation:
            self.violation = self.violation or violation
            raise
        operation.keep = ()
        if operation.touches is not None:
            for memory, *span in operation.writes:
                memory.mark_written(*span)
            self._order.exchange(operation, words)

    # Order.

    def _submit(self, operation: Operation) -> None:
        self._require(self._order.queue(operation))
        if self._trace is not None:
            self._trace.append(f"queue: {operation.what_it_touches()}")
        operation.stream.queue.append(operation)

    def _locate(self, operation: Operation, reads: Rows, writes: Rows) -> None:
        """An operation starts, and is asked only now what it touches."""
        for tensor, row_ids in reads:
            regions = self._rows(tensor, row_ids)
            operation.reads += regions
            operation.words_read += [region for region in regions if not region[0].is_device]
        for tensor, row_ids in writes:
            for region in self._rows(tensor, row_ids):
                (operation.writes if region[0].is_device else operation.words_written).append(region)
        self._require(self._order.locate(operation))
        if self._trace is not None:
            self._trace.append(f"touch: {operation.what_it_touches()}")

    def _require(self, message: str) -> None:
        if message:
            self._fail(message)

    def _new_stream(self, name: str) -> ModelledStream:
        stream = ModelledStream(name, len(self._streams) + 1)
        self._streams.append(stream)
        self._order.host_clock.append(0)
        for one in self._streams:
            one.clock.append(0)
        return stream

    def _region(self, address: int, byte_count: int, role: str, *, is_device: bool) -> Region:
        region = self._memory.region(address, byte_count)
        if region is None or region[0].is_device is not is_device:
            where = "memory of the device" if is_device else "registered or staging memory"
            self._fail(f"{role}, {byte_count} bytes, is not in {where}")
        return region

    def _device_rows(self, tensor: torch.Tensor, row_ids: Iterable[int]) -> list[Region]:
        self._region(tensor.data_ptr(), tensor.nbytes, "what a kernel touches", is_device=True)
        return self._rows(tensor, row_ids)

    def _rows(self, tensor: torch.Tensor, row_ids: Iterable[int]) -> list[Region]:
        if not tensor.numel():
            return []
        row_bytes = tensor.nbytes // tensor.shape[0]
        region = self._memory.region(tensor.data_ptr(), tensor.nbytes)
        if region is None:
            self._fail(f"what a kernel touches, {tensor.nbytes} bytes, is in no memory that the device reaches")
        memory, start, stop = region
        regions = [(memory, start + row_id * row_bytes, start + (row_id + 1) * row_bytes) for row_id in row_ids]
        if not all(start <= first and last <= stop for _, first, last in regions):
            self._fail(f"a kernel touches rows {list(row_ids)} of {memory.name}, which has {tensor.shape[0]}")
        return regions

    def _fail(self, message: str) -> NoReturn:
        raise self.violate(message)
