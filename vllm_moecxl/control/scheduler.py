"""Which chunk a link copies next: transfers cut in chunks, each given to the link that is predicted to have it first.

A chunk waits at one link, in the heap of those that the same links could copy. So a link finds its own best chunk, and
an idle one the best that it may steal, at the heads of a few heaps: one for each combination of banks that share slabs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from heapq import heapify, heappop, heappush

from vllm_moecxl.control.links import Link, LinkLimits, Offer
from vllm_moecxl.types import Cause

#: Removed entries that a heap may hold without being swept, however few others it has.
STALE_ENTRIES_MAX = 32


class Transfer:
    """Chunks that are wanted together, such as a slab's. The scheduler alone changes it.

    Attributes:
        cause: its class.
        deadline: when it is needed, earlier is better; any scale that all transfers share.
        wanters: requests that want it; may be empty.
        payload: the caller's.
        in_flight_count: chunks that are being copied.
        is_cancelled: what is still queued of it will never be given.
    """

    __slots__ = ("_chunks", "_left_count", "cause", "deadline", "in_flight_count", "is_cancelled", "payload", "wanters")

    def __init__(self, cause: Cause, deadline: float, wanters: Collection[str], payload: object) -> None:
        self.cause = cause
        self.deadline = deadline
        self.wanters = set(wanters)
        self.payload = payload
        self.in_flight_count = 0
        self.is_cancelled = False
        self._chunks: list[Chunk] = []
        self._left_count = 0

    @property
    def is_done(self) -> bool:
        """Whether every chunk is complete (of a cancelled transfer too, where all were in flight already)."""
        return self._left_count == 0


class Chunk:
    """One piece of a transfer, copied by one link at a time.

    Attributes:
        transfer: that it is a piece of.
        index: its place among the transfer's chunks, as submitted.
        byte_count: its size.
        link_ids: links whose bank holds a copy of it, home first.
        link_id: link at which it is queued or in flight.
    """

    __slots__ = (
        "_entry",
        "_is_in_flight",
        "_queue",
        "_serial",
        "_tag",
        "byte_count",
        "index",
        "link_id",
        "link_ids",
        "transfer",
    )

    def __init__(self, transfer: Transfer, index: int, byte_count: int, link_ids: tuple[int, ...], serial: int) -> None:
        self.transfer = transfer
        self.index = index
        self.byte_count = byte_count
        self.link_ids = link_ids
        self.link_id = link_ids[0]
        self._serial = serial
        self._tag = 0
        self._queue: Queue
        self._entry: _Entry | None = None  # where it is queued; any other entry of it is stale
        self._is_in_flight = False


#: Class, deadline, fairness tag and serial number, by which chunks are ordered, and the chunk.
_Entry = tuple[Cause, float, int, int, Chunk]


class Scheduler:
    """What all links have to copy. Not thread-safe: its owner holds a lock.

    Order on a link: class, then deadline, then fairness between wanters, then submission. A better class preempts at
    the next chunk, since links ask for one chunk at a time. Links are numbered as in `links`.

    Args:
        links: limits of each link.
    """

    def __init__(self, links: Sequence[LinkLimits]) -> None:
        self._links = [Link(limits) for limits in links]
        #: For each link, the queues of others whose chunks it could copy too.
        self._stealable: list[list[Queue]] = [[] for _ in links]
        self._serial = 0
        #: wanter -> transfers under way that it wants, in the order of wanting.
        self._wanted: dict[str, dict[Transfer, None]] = {}

    def submit(
        self,
        chunks: Sequence[tuple[int, tuple[int, ...]]],
        cause: Cause,
        deadline: float,
        wanters: Collection[str],
        payload: object,
        now_s: float,
    ) -> Transfer:
        """Queue a transfer.

        Args:
            chunks: bytes of each, and the links whose bank holds a copy of it, home first. At least one.
            cause: its class.
            deadline: when it is needed, on any scale that all transfers share.
            wanters: requests that want it; of several, the one that was served least pays.
            payload: the caller's.
            now_s: the clock.
        """
        assert chunks and deadline == deadline
        transfer = Transfer(cause, deadline, wanters, payload)
        serial = self._serial
        for index, (byte_count, link_ids) in enumerate(chunks):
            assert byte_count > 0
            transfer._chunks.append(Chunk(transfer, index, byte_count, link_ids, serial + index))
        transfer._left_count = len(chunks)
        self._serial += len(chunks)
        for wanter in transfer.wanters:
            self._wanted.setdefault(wanter, {})[transfer] = None
        self._assign(transfer, transfer._chunks, now_s)
        return transfer

    def promote(
        self, transfer: Transfer, cause: Cause, deadline: float, now_s: float, wanters: Collection[str] = ()
    ) -> None:
        """Join a transfer under way: it gets the better class, the earlier deadline, and these wanters beside its own.

        What is queued moves ahead accordingly, and looks for the best link again if its class has changed.
        """
        assert not transfer.is_cancelled and deadline == deadline
        if transfer.is_done:
            return
        for wanter in wanters:
            transfer.wanters.add(wanter)
            self._wanted.setdefault(wanter, {})[transfer] = None
        cause_before = transfer.cause
        if cause >= cause_before and deadline >= transfer.deadline:
            return
        queued = [chunk for chunk in transfer._chunks if chunk._entry is not None]
        for chunk in queued:
            self._remove(chunk)
        transfer.cause = min(cause, cause_before)
        transfer.deadline = min(deadline, transfer.deadline)
        if transfer.cause != cause_before:
            self._assign(transfer, queued, now_s)
        else:
            for chunk in queued:
                self._queue(chunk)

    def next(self, link_id: int, now_s: float, cause_max: Cause = Cause.MIGRATION) -> Chunk | None:
        """Take the chunk that a link copies next: it is in flight from now on.

        Args:
            link_id: the link. One that has nothing of its own takes what another would have finished later.
            now_s: the clock.
            cause_max: the least urgent class to take.

        Returns:
            None where there is nothing to take, or the best of it exceeds the bytes that the link may have in flight.
            A smaller chunk does not overtake that one: a large one would wait forever. An idle link takes any.
        """
        link = self._links[link_id]
        heads = _heads(link.queues.values(), cause_max)
        entry = min(heads) if heads else self._best_of_others(link_id, now_s, cause_max)
        if entry is None:
            return None
        chunk = entry[-1]
        if link.in_flight_bytes and link.in_flight_bytes + chunk.byte_count > link.limits.in_flight_bytes_max:
            return None
        transfer = chunk.transfer
        self._links[chunk.link_id].queued_bytes[transfer.cause] -= chunk.byte_count
        chunk._queue.pop()
        fairness = link.fairness[transfer.cause]
        if chunk.link_id != link_id:
            chunk.link_id = link_id
            chunk._tag = fairness.enter(transfer.wanters, chunk.byte_count)
        fairness.clock = max(fairness.clock, chunk._tag)
        link.begin(chunk.byte_count, now_s)
        chunk._is_in_flight = True
        transfer.in_flight_count += 1
        return chunk

    def complete(self, chunk: Chunk, now_s: float) -> bool:
        """A chunk in flight has arrived.

        Returns:
            Whether that was the transfer's last: it is done, or it was cancelled and nothing of it is in flight.
        """
        transfer = chunk.transfer
        self._land(chunk)
        self._links[chunk.link_id].measure(chunk.byte_count, now_s)
        transfer._left_count -= 1
        if transfer.is_done and not transfer.is_cancelled:
            self._retire(transfer)
        return transfer.is_done or (transfer.is_cancelled and transfer.in_flight_count == 0)

    def give_back(self, chunk: Chunk, now_s: float) -> None:
        """A chunk was taken, but nothing of it was copied: it is queued again, unless it was cancelled meanwhile.

        It was the first in line, and is again: ahead of all others of its class and deadline at that link.
        """
        self._land(chunk)
        link = self._links[chunk.link_id]
        if not link.in_flight_bytes:
            link.busy_since_s = now_s
        if not chunk.transfer.is_cancelled:
            chunk._tag = 0
            self._queue(chunk)

    def cancel(self, transfer: Transfer) -> None:
        """Never give what is queued of a transfer; what is in flight still has to complete, or be given back."""
        if transfer.is_done or transfer.is_cancelled:
            return
        transfer.is_cancelled = True
        for chunk in transfer._chunks:
            if chunk._entry is not None:
                self._remove(chunk)
        self._retire(transfer)

    def forget(self, wanter: str) -> list[Transfer]:
        """A request is gone: cancel what only it wanted, except what a forward waits for.

        Has to be called for every request that was a wanter: its accounts are kept until then.

        Returns:
            The transfers that were cancelled.
        """
        for link in self._links:
            for fairness in link.fairness:
                fairness.paid_bytes.pop(wanter, None)
        cancelled = []
        for transfer in self._wanted.pop(wanter, {}):
            transfer.wanters.remove(wanter)
            if not transfer.wanters and transfer.cause != Cause.DEMAND:
                self.cancel(transfer)
                cancelled.append(transfer)
        return cancelled

    def predicted_completion_s(self, link_id: int, byte_count: int, now_s: float, cause: Cause) -> float:
        """When a link would have copied `byte_count` bytes if they were submitted now, behind all of their class."""
        link = self._links[link_id]
        return link.completion_s(link.queued_up_to(cause) + byte_count, now_s)

    def has_work(self, cause_max: Cause = Cause.MIGRATION) -> bool:
        """Whether anything of `cause_max` or better is queued, at any link."""
        return any(link.queued_up_to(cause_max) for link in self._links)

    def in_flight_bytes(self, link_id: int) -> int:
        """Bytes that a link is copying."""
        return self._links[link_id].in_flight_bytes

    def bytes_per_s(self, link_id: int, now_s: float) -> float:
        """Rate that a link is believed to have now."""
        seconds = self._links[link_id].seconds_per_byte(now_s)
        return 1 / seconds if seconds else float("inf")

    def _assign(self, transfer: Transfer, chunks: Iterable[Chunk], now_s: float) -> None:
        """Queue chunks at the link that is predicted to have each first, the home where it makes no difference."""
        offers: dict[int, Offer] = {}
        for chunk in chunks:
            best_s = math.inf
            for link_id in chunk.link_ids:
                offer = offers.get(link_id)
                if offer is None:
                    offer = offers[link_id] = Offer(self._links[link_id], transfer.cause, now_s)
                if (completion_s := offer.completion_s(chunk.byte_count)) < best_s:
                    best_s, chunk.link_id = completion_s, link_id
            offers[chunk.link_id].take(chunk)
        # A transfer is one packet of each link's fair queue: half a slab is of no use to anybody.
        for link_id, offer in offers.items():
            if offer.chunks:
                fairness = self._links[link_id].fairness[transfer.cause]
                tag = fairness.enter(transfer.wanters, sum(chunk.byte_count for chunk in offer.chunks))
                for chunk in offer.chunks:
                    chunk._tag = tag
                    self._queue(chunk)

    def _queue(self, chunk: Chunk) -> None:
        link = self._links[chunk.link_id]
        queue = link.queues.get(chunk.link_ids)
        if queue is None:
            queue = link.queues[chunk.link_ids] = Queue()
            for link_id in chunk.link_ids:
                if link_id != chunk.link_id:
                    self._stealable[link_id].append(queue)
        link.queued_bytes[chunk.transfer.cause] += chunk.byte_count
        queue.push(chunk)

    def _remove(self, chunk: Chunk) -> None:
        self._links[chunk.link_id].queued_bytes[chunk.transfer.cause] -= chunk.byte_count
        chunk._queue.remove(chunk)

    def _best_of_others(self, thief_id: int, now_s: float, cause_max: Cause) -> _Entry | None:
        """The best chunk of another link that an idle one would have sooner."""
        for entry in sorted(_heads(self._stealable[thief_id], cause_max)):
            cause, chunk = entry[0], entry[-1]
            owner = self._links[chunk.link_id]
            # As a head it is about to be given: only what is in flight, and the classes before its own, go first.
            owner_s = owner.completion_s(owner.queued_up_to(cause - 1) + chunk.byte_count, now_s)
            if self.predicted_completion_s(thief_id, chunk.byte_count, now_s, cause) < owner_s:
                return entry
        return None

    def _land(self, chunk: Chunk) -> None:
        assert chunk._is_in_flight, "a chunk that was not taken, or has ended before"
        chunk._is_in_flight = False
        chunk.transfer.in_flight_count -= 1
        self._links[chunk.link_id].in_flight_bytes -= chunk.byte_count

    def _retire(self, transfer: Transfer) -> None:
        for wanter in transfer.wanters:
            wanted = self._wanted[wanter]
            del wanted[transfer]
            if not wanted:
                del self._wanted[wanter]
        # Chunks and their transfer refer to each other: untied, they do not wait for the cycle collector.
        transfer._chunks = []


def _heads(queues: Iterable[Queue], cause_max: Cause) -> list[_Entry]:
    return [entry for queue in queues if (entry := queue.head()) and entry[0] <= cause_max]


class Queue:
    """Chunks queued at one link that the same links hold, as a heap. What is removed stays in it until it surfaces."""

    __slots__ = ("_entries", "_stale_count")

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._stale_count = 0

    def push(self, chunk: Chunk) -> None:
        transfer = chunk.transfer
        chunk._queue = self
        chunk._entry = entry = (transfer.cause, transfer.deadline, chunk._tag, chunk._serial, chunk)
        heappush(self._entries, entry)

    def head(self) -> _Entry | None:
        """The best entry, which stays."""
        entries = self._entries
        while entries:
            entry = entries[0]
            if entry[-1]._entry is entry:
                return entry
            heappop(entries)
            self._stale_count -= 1
        return None

    def pop(self) -> None:
        """Take out the entry that `head` has just answered."""
        heappop(self._entries)[-1]._entry = None

    def remove(self, chunk: Chunk) -> None:
        chunk._entry = None
        self._stale_count += 1
        if self._stale_count > max(STALE_ENTRIES_MAX, len(self._entries) // 2):
            self._entries = [entry for entry in self._entries if entry[-1]._entry is entry]
            heapify(self._entries)
            self._stale_count = 0
