"""Carries slabs in virtual time: the engine's scheduler and chunks, on modelled links.

It holds the clock. Time passes only while somebody computes (`advance`) or waits; nothing happens in between but what
is due: a chunk arrives, or a call that was asked for is made.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush

from vllm_moecxl.control.device_model import DeviceModel, Upstream
from vllm_moecxl.control.placement import Route
from vllm_moecxl.control.scheduler import Chunk, Scheduler, Transfer
from vllm_moecxl.control.simulator.machine import Hardware
from vllm_moecxl.control.striping import cut
from vllm_moecxl.types import Cause

#: Where the rows of a stripe may be cut. Source: `data.slabs`.
_STRIPE_GRANULE_BYTES = 4096

#: Bytes of each chunk, and the links that it may take: what the scheduler is given.
Chunks = Sequence[tuple[int, tuple[int, ...]]]


class Fetch:
    """One slab on its way.

    Attributes:
        transfer: what the scheduler knows of it.
        has_landed: whether every byte is there.
        is_ahead: whether it goes into a layer buffer that nobody needs yet.
        queued_count: its chunks that no link has taken.
    """

    __slots__ = ("has_landed", "is_ahead", "queued_count", "transfer")

    def __init__(self, chunk_count: int, *, is_ahead: bool) -> None:
        self.transfer: Transfer
        self.queued_count = chunk_count
        self.has_landed = False
        self.is_ahead = is_ahead

    @property
    def is_over(self) -> bool:
        """Whether it was given up, and nothing of it is in flight any more."""
        return self.transfer.is_cancelled and not self.transfer.in_flight_count


@dataclass
class Traffic:
    """What was moved.

    Attributes:
        by_bank: [banks] bytes.
        by_cause: [causes] bytes, by the class that a chunk had when it arrived.
        ahead_bytes: those of PREFETCH that went into a layer buffer.
        landed_count: slabs that have landed.
    """

    by_bank: list[int]
    by_cause: list[int] = field(default_factory=lambda: [0 for _ in Cause])
    ahead_bytes: int = 0
    landed_count: int = 0

    def count(self, link_id: int, cause: Cause, byte_count: int, *, is_ahead: bool) -> None:
        """A chunk has arrived."""
        self.by_bank[link_id] += byte_count
        self.by_cause[cause] += byte_count
        if is_ahead and cause is Cause.PREFETCH:
            self.ahead_bytes += byte_count


class _Link:
    """One bank's way to the device: the model of the bank, and the hands that are busy with it."""

    def __init__(self, model: DeviceModel, hand_count: int | None) -> None:
        self.model = model
        #: Chunks that may be under way beside the one of who waits; None where no threads are needed.
        self.hand_count = hand_count
        self.busy_count = 0
        self.stalled_until_s = 0.0


class Mover:
    """See the module.

    Args:
        hardware: its banks are the links, in this order.
        has_hands: whether anybody carries while nobody waits.
        seed: of the tails of the banks' latencies.
    """

    def __init__(self, hardware: Hardware, *, has_hands: bool, seed: int) -> None:
        upstream = None if hardware.link_bytes_per_s is None else Upstream(hardware.link_bytes_per_s)
        self._banks = hardware.linked_banks()
        limit = hardware.device.in_flight_bytes_max
        self._scheduler = Scheduler([bank.limits(limit) for bank in self._banks])
        self._links = [
            _Link(
                DeviceModel(bank.spec, seed=seed + index, upstream=upstream),
                (bank.reader_count if hardware.device.is_host else None) if has_hands else 0,
            )
            for index, bank in enumerate(self._banks)
        ]
        self.now_s = 0.0
        self.traffic = Traffic([0] * len(self._banks))
        #: What is due: a chunk that arrives (with the link whose hand has it, or None for who waits), or a call.
        self._due: list[tuple[float, int, Chunk | Callable[[], None], int | None]] = []
        self._serial = 0
        self._is_awaited = False
        self._waiter_is_busy = False
        #: Chunks of all fetches that no link has taken.
        self._queued_count = 0

    def cut(self, route: Route, slab_bytes: int) -> tuple[Chunks, Chunks]:
        """A slab in chunks as the engine cuts it, and in one chunk for each bank.

        A demand may go in the latter: nothing overtakes it.
        """
        pieces = cut(slab_bytes, [part.share for part in route], _STRIPE_GRANULE_BYTES)
        fine: list[tuple[int, tuple[int, ...]]] = []
        whole: list[tuple[int, tuple[int, ...]]] = []
        for part, (start, stop) in zip(route, pieces, strict=True):
            if start == stop:
                continue
            links = (part.bank_index,)
            whole.append((stop - start, links))
            chunk_bytes = self._banks[part.bank_index].chunk_bytes
            fine += [(min(chunk_bytes, stop - at), links) for at in range(start, stop, chunk_bytes)]
        return fine, whole

    def start(
        self,
        chunks: Chunks,
        cause: Cause,
        deadline: float,
        wanters: Collection[str] = (),
        *,
        is_ahead: bool = False,
    ) -> Fetch:
        """Have a slab brought; see the engine's mover."""
        fetch = Fetch(len(chunks), is_ahead=is_ahead)
        self._queued_count += len(chunks)
        fetch.transfer = self._scheduler.submit(chunks, cause, deadline, wanters, fetch, self.now_s)
        for link_id in {link_id for _, link_ids in chunks for link_id in link_ids}:
            self._feed(link_id)
        return fetch

    def promote(self, fetch: Fetch, cause: Cause, deadline: float, wanters: Collection[str] = ()) -> bool:
        """Join a fetch that is under way; False where it was given up."""
        if fetch.transfer.is_cancelled and not fetch.has_landed:
            return False
        if not fetch.transfer.is_cancelled:
            self._scheduler.promote(fetch.transfer, cause, deadline, self.now_s, wanters)
        return True

    def wait(self, fetches: Collection[Fetch]) -> None:
        """Let time pass until all have landed; who waits carries too."""
        self._is_awaited = True
        try:
            self._feed_all()
            while not all(fetch.has_landed for fetch in fetches):
                assert not any(fetch.transfer.is_cancelled for fetch in fetches), "nobody cancels what is waited for"
                self._next_event()
        finally:
            self._is_awaited = False

    def cancel(self, fetches: Collection[Fetch]) -> None:
        """Give fetches up, and let time pass until nothing of them is in flight."""
        for fetch in fetches:
            self.give_up(fetch)
        calls = []
        while any(fetch.transfer.in_flight_count for fetch in fetches):
            due = heappop(self._due)
            if isinstance(due[2], Chunk):
                self._arrive(due[0], due[2], due[3])
            else:  # who cancels is in the middle of something
                calls.append(due)
        for due in calls:
            heappush(self._due, due)

    def give_up(self, fetch: Fetch) -> None:
        """Stop bringing a slab; what is in flight of it still arrives."""
        self._scheduler.cancel(fetch.transfer)
        self._unqueue(fetch)

    def forget(self, wanter: str) -> None:
        """A request is gone: give up what only it wanted."""
        for transfer in self._scheduler.forget(wanter):
            assert isinstance(transfer.payload, Fetch)
            self._unqueue(transfer.payload)

    def _unqueue(self, fetch: Fetch) -> None:
        self._queued_count -= fetch.queued_count
        fetch.queued_count = 0

    def advance(self, duration_s: float) -> None:
        """Let time pass while the device computes."""
        assert duration_s >= 0
        end_s = self.now_s + duration_s
        while self._due and self._due[0][0] <= end_s:
            self._next_event()
        self.now_s = end_s

    def call_at(self, time_s: float, call: Callable[[], None]) -> None:
        """Have something done at a time, by whoever lets it pass."""
        self._push(max(time_s, self.now_s), call, None)

    def drain(self) -> None:
        """Let time pass until nothing is on its way; only where there are hands."""
        while any(isinstance(entry[2], Chunk) for entry in self._due):
            self._next_event()

    def queue_s(self, link_ids: Collection[int]) -> float:
        """Seconds until these links have copied what forwards and prefetches have queued."""
        predict = self._scheduler.predicted_completion_s
        return max(predict(link_id, 0, self.now_s, Cause.PREFETCH) for link_id in link_ids) - self.now_s

    def slow_down(self, link_id: int, factor: float) -> None:
        """From now on a bank has this part of its profile's bandwidth; nobody tells the scheduler."""
        spec = self._banks[link_id].spec
        self._links[link_id].model.spec = replace(spec, read_bytes_per_s=spec.read_bytes_per_s * factor)

    def stall(self, link_id: int, duration_s: float) -> None:
        """A bank begins nothing new for a while."""
        self._links[link_id].stalled_until_s = self.now_s + duration_s

    def _feed_all(self) -> None:
        for link_id in range(len(self._links)):
            if not self._queued_count:
                return
            self._feed(link_id)

    def _feed(self, link_id: int) -> None:
        """Give a link what its hands, and whoever waits, can take."""
        link = self._links[link_id]
        while self._queued_count and (link.hand_count is None or link.busy_count < link.hand_count):
            chunk = self._scheduler.next(link_id, self.now_s)
            if chunk is None:
                return
            link.busy_count += 1
            self._carry(link, chunk, link_id)
        if self._queued_count and self._is_awaited and not self._waiter_is_busy:
            chunk = self._scheduler.next(link_id, self.now_s, Cause.DEMAND)
            if chunk is not None:
                self._waiter_is_busy = True
                self._carry(link, chunk, None)

    def _carry(self, link: _Link, chunk: Chunk, hand: int | None) -> None:
        fetch = chunk.transfer.payload
        assert isinstance(fetch, Fetch)
        fetch.queued_count -= 1
        self._queued_count -= 1
        start_s = max(self.now_s, link.stalled_until_s)
        self._push(link.model.submit(start_s, chunk.byte_count), chunk, hand)

    def _push(self, time_s: float, what: Chunk | Callable[[], None], hand: int | None) -> None:
        self._serial += 1
        heappush(self._due, (time_s, self._serial, what, hand))

    def _next_event(self) -> None:
        time_s, _, what, hand = heappop(self._due)
        if isinstance(what, Chunk):
            self._arrive(time_s, what, hand)
        else:
            self.now_s = max(self.now_s, time_s)
            what()

    def _arrive(self, time_s: float, chunk: Chunk, hand: int | None) -> None:
        assert time_s >= self.now_s, "time does not go back"
        self.now_s = time_s
        transfer, link_id = chunk.transfer, chunk.link_id
        fetch = transfer.payload
        assert isinstance(fetch, Fetch)
        if hand is None:
            self._waiter_is_busy = False
        else:
            self._links[hand].busy_count -= 1
        self.traffic.count(link_id, transfer.cause, chunk.byte_count, is_ahead=fetch.is_ahead)
        if self._scheduler.complete(chunk, time_s) and not transfer.is_cancelled:
            fetch.has_landed = True
            self.traffic.landed_count += 1
        if hand is None:  # who waits takes the best of any link
            self._feed_all()
        elif self._queued_count:
            self._feed(link_id)
