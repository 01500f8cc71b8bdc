"""Carries slabs from banks into cells: chunk by chunk, in the scheduler's order, by threads of its own and by whoever
waits.

The *hands* are threads that take chunks from the scheduler, a few for each bank. Whoever waits for a slab takes chunks
too, so that nothing depends on the hands: without them, or when one has died, the forward carries its slabs itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from vllm_moecxl.control.chunking import link_limits
from vllm_moecxl.control.links import LinkLimits
from vllm_moecxl.control.scheduler import Chunk, Scheduler
from vllm_moecxl.data.banks.base import Bank
from vllm_moecxl.data.carrier import Carrier
from vllm_moecxl.data.devices.base import DeviceBackend, Event
from vllm_moecxl.data.fetch import Fetch
from vllm_moecxl.data.slabs import Home, Piece, SlabTarget
from vllm_moecxl.linux import affinity
from vllm_moecxl.types import Cause

logger = logging.getLogger("vllm.moecxl")

#: A chunk that is under way for longer than this is told of: no bank needs a second for a few MiB.
_SLOW_S = 10.0
#: Closing waits this long for a bank that does not answer.
_CLOSE_S = 1.0
#: Chunks that one `feed` issues at most, so that it is short: each costs 20 to 40 us.
_FEED_COUNT = 4


class Observer(Protocol):
    """Is told what happens on the links; called with the mover's lock held, from any thread."""

    def moved(self, bank_name: str, byte_count: int, cause: Cause) -> None:
        """A chunk has arrived."""

    def was_busy(self, bank_name: str, duration_s: float) -> None:
        """A link had something in flight for this long, and has nothing now."""

    def landed(self, cause: Cause, duration_s: float) -> None:
        """A slab has arrived, this long after it was asked for."""

    def failed(self, bank_name: str) -> None:
        """A bank could not be read, or does not answer."""


class _Link:
    """One bank's way to the device."""

    def __init__(self, bank: Bank, lock: threading.RLock) -> None:
        self.bank = bank
        self.work = threading.Condition(lock)
        #: Chunks under way, and since when there is any.
        self.in_flight: dict[Chunk, float] = {}
        self.busy_since_s = 0.0
        self.is_reported_slow = False
        #: Whether the device reads the bank's memory by itself.
        self.is_registered = False
        self.has_hands = False
        #: Whether it was ever one of several that could carry a chunk.
        self.may_take_over = False


class Mover:
    """See the module. All methods may be called by any thread.

    Args:
        banks: in the order of the links; by name, what homes are made of.
        backend: the device.
        observer: is told what happens.
        has_hands: whether to start threads; without, everything is carried by those who wait or feed.
        clock: seconds.
    """

    def __init__(
        self,
        banks: Sequence[Bank],
        backend: DeviceBackend,
        observer: Observer,
        *,
        has_hands: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        # Re-entrant, since the collector may run `close` in a thread that is inside.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._links = [_Link(bank, self._lock) for bank in banks]
        self._link_ids = {bank.name: link_id for link_id, bank in enumerate(banks)}
        self._backend = backend
        self._observer = observer
        self._has_hands = has_hands
        self._clock = clock
        self._scheduler = Scheduler([_limits(bank, backend.in_flight_bytes_max) for bank in banks])
        self._carrier = Carrier(backend, max(bank.chunk_bytes for bank in banks))
        #: Copies that the device has not finished, as far as anybody has looked.
        self._flying: deque[tuple[Event, Chunk]] = deque()
        self._is_closed = False
        #: What ended a hand, if something has.
        self.failure: BaseException | None = None

    def mark_registered(self, bank_name: str) -> None:
        """From now on the device copies from this bank's memory by itself."""
        self._links[self._link_ids[bank_name]].is_registered = True

    def start(
        self,
        home: Home,
        expert_id: int,
        target: SlabTarget,
        cause: Cause,
        deadline: float,
        wanters: Collection[str] = (),
        after: Event | None = None,
    ) -> Fetch:
        """Have a slab brought into a cell; returns at once.

        Args:
            target: per extent a [row bytes] uint8 tensor on the device, which nobody else writes until the fetch is
                over and nothing of it is in flight.
            deadline: position in the order of layers; the earliest goes first.
            wanters: requests that it is for; none for the forward itself.
            after: copies into the cell wait for this event, on the device.
        """
        fetch = Fetch(home, expert_id, target, after, self._clock())
        # Decided once: another fetch of the slab may have verified it before this one is carried.
        if not self._backend.is_host and home.needs_check(expert_id):
            fetch.is_whole = True
            fetch.unissued_count = 1
            chunks = [(home.slab_bytes, self._sources(home, fetch.pieces[0])[:1])]
        else:
            chunks = [(piece.byte_count, self._sources(home, piece)) for piece in fetch.pieces]
        with self._lock:
            fetch.transfer = self._scheduler.submit(chunks, cause, deadline, wanters, fetch, self._clock())
            for link_ids in {link_ids for _, link_ids in chunks}:
                for link_id in link_ids:
                    self._links[link_id].may_take_over |= len(link_ids) > 1
                    self._wake(link_id)
        return fetch

    def promote(self, fetch: Fetch, cause: Cause, deadline: float, wanters: Collection[str] = ()) -> bool:
        """Join a fetch that is under way: it becomes as urgent as this, if it was not.

        Returns:
            False: it was given up or has failed, the slab has to be asked for again.
        """
        with self._lock:
            if fetch.error is not None or (fetch.transfer.is_cancelled and not fetch.has_landed):
                return False
            if not fetch.transfer.is_cancelled:
                self._scheduler.promote(fetch.transfer, cause, deadline, self._clock(), wanters)
            return True

    def wait(self, fetches: Collection[Fetch]) -> None:
        """Return when kernels that are launched from now on find the slabs in their cells; help until then.

        Raises:
            TransferError, IntegrityError: one of them will not arrive. Others may still be in flight.
        """
        with self._lock:
            waited_since_s = self._clock()
            while True:
                for fetch in fetches:
                    if fetch.error is not None:
                        raise fetch.error
                if all(map(self._is_readable, fetches)):
                    break
                assert not any(fetch.transfer.is_cancelled for fetch in fetches), "nobody cancels what is waited for"
                if self._step(range(len(self._links)), Cause.DEMAND) or self._poll():
                    continue
                if (unchecked := next(filter(self._is_unchecked, fetches), None)) is not None:
                    self._land(unchecked)
                    continue
                if self._flying:
                    self._backend.synchronize(self._flying[0][0])
                    continue
                self._changed.wait(_SLOW_S)
                if self._clock() - waited_since_s > _SLOW_S:
                    self._report_slow_links()
        if not self._backend.is_host:
            compute = self._backend.compute_stream()
            for fetch in fetches:
                for event in fetch.events:
                    self._backend.wait(compute, event)

    def give_up(self, fetch: Fetch) -> None:
        """Stop bringing a slab; what is in flight of it still arrives, `cancel` waits for that."""
        with self._lock:
            self._scheduler.cancel(fetch.transfer)

    def cancel(self, fetches: Collection[Fetch]) -> None:
        """Give fetches up; returns when nothing of them is in flight any more: their cells may be written again."""
        with self._lock:
            for fetch in fetches:
                self._scheduler.cancel(fetch.transfer)
            while any(fetch.transfer.in_flight_count or fetch.is_checking for fetch in fetches):
                if self._poll():
                    continue
                if self._flying:
                    self._backend.synchronize(self._flying[0][0])
                    continue
                self._changed.wait()

    def forget(self, wanter: str) -> list[Fetch]:
        """A request is gone: give up what only it wanted; what was given up, perhaps still in flight."""
        with self._lock:
            return [fetch for t in self._scheduler.forget(wanter) if isinstance(fetch := t.payload, Fetch)]

    def queue_s(self, home: Home, cause: Cause) -> float:
        """Seconds until the links of a home's banks have copied what is in flight, and queued of `cause` or better."""
        with self._lock:
            now_s = self._clock()
            link_ids = {self._link_ids[shard.bank.name] for shard in home.shards}
            return max(self._scheduler.predicted_completion_s(link_id, 0, now_s, cause) for link_id in link_ids) - now_s

    def feed(self) -> None:
        """Issue what needs no waiting for, and note what has arrived: what a device needs done now and then."""
        with self._lock:
            self._poll()
            links = [link_id for link_id, link in enumerate(self._links) if not self._needs_hands(link)]
            for _ in range(_FEED_COUNT):
                if not self._step(links, Cause.MIGRATION):
                    break
            if self._scheduler.has_work():
                # A bank that is late by now loses what is queued for it to those that have replicas.
                for link in self._links:
                    if link.may_take_over and link.has_hands and not link.in_flight:
                        link.work.notify()

    def poll(self) -> None:
        """Note what the device has finished."""
        with self._lock:
            self._poll()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is queued or in flight."""
        with self._lock:
            self._poll()
            return not self._scheduler.has_work() and not any(link.in_flight for link in self._links)

    def close(self) -> None:
        """Tell the hands to end, and wait until nothing is in flight any more."""
        with self._lock:
            self._is_closed = True
            for link in self._links:
                link.work.notify_all()
            # Not for ever: the collector may run this in the very thread that carries something.
            end_s = self._clock() + _CLOSE_S
            while any(link.in_flight for link in self._links) and self._clock() < end_s:
                if self._poll():
                    continue
                if self._flying:
                    self._backend.synchronize(self._flying[0][0])
                    continue
                self._changed.wait(_CLOSE_S)

    def _sources(self, home: Home, piece: Piece) -> tuple[int, ...]:
        return tuple(self._link_ids[home.shards[place.shard_id].bank.name] for place in piece.places)

    def _is_readable(self, fetch: Fetch) -> bool:
        return fetch.has_landed or (not self._backend.is_host and not fetch.unissued_count)

    def _is_unchecked(self, fetch: Fetch) -> bool:
        """Whether the one who was to hold a slab against its digest has been ended."""
        return self._backend.is_host and fetch.transfer.is_done and not (fetch.has_landed or fetch.is_checking)

    def _needs_hands(self, link: _Link) -> bool:
        """Whether carrying a chunk of this link blocks the thread, and there are others to do it."""
        return self._has_hands and (self._backend.is_host or not link.is_registered)

    def _wake(self, link_id: int) -> None:
        link = self._links[link_id]
        if not self._needs_hands(link):
            return
        if not link.has_hands:
            link.has_hands = True
            for index in range(link.bank.reader_count):
                name = f"moecxl-{link.bank.name}-{index}"
                threading.Thread(target=self._serve, args=(link_id,), name=name, daemon=True).start()
        link.work.notify_all()

    def _serve(self, link_id: int) -> None:
        """The life of a hand."""
        link = self._links[link_id]
        try:
            self._backend.adopt_thread()
            affinity.precise_sleep()
            with self._lock:
                while not self._is_closed:
                    if not self._step((link_id,), Cause.MIGRATION):
                        link.work.wait()
        except BaseException as error:  # noqa: BLE001  recorded, shown by the sidecar; its chunk was given back
            self.failure = error
            logger.error("MoE offload: a thread that reads bank %s has ended (%r)", link.bank.name, error)

    def _step(self, link_ids: Iterable[int], cause_max: Cause) -> bool:
        """Carry one chunk, with the lock given up meanwhile; False where there is none to be had."""
        for link_id in link_ids:
            now_s = self._clock()
            chunk = self._scheduler.next(link_id, now_s, cause_max)
            if chunk is None:
                continue
            link = self._links[link_id]
            if not link.in_flight:
                link.busy_since_s = now_s
            link.in_flight[chunk] = now_s
            self._carry(chunk, link_id)
            return True
        return False

    def _carry(self, chunk: Chunk, link_id: int) -> None:
        fetch = chunk.transfer.payload
        assert isinstance(fetch, Fetch)
        event: Event | None = None
        error: Exception | None = None
        try:
            with self._unlocked():
                try:
                    event = self._copy(fetch, chunk, link_id)
                except Exception as caught:  # noqa: BLE001  raised in whoever waits for the slab
                    error = caught
        except BaseException:  # this thread is being ended: somebody else has to do it
            self._leave(chunk, link_id)
            self._scheduler.give_back(chunk, self._clock())
            self._links[link_id].work.notify_all()
            self._changed.notify_all()
            raise
        if error is not None:
            self._leave(chunk, link_id)
            self._scheduler.complete(chunk, self._clock())
            self._scheduler.cancel(chunk.transfer)
            self._fail(fetch, error, None if fetch.is_whole else link_id)
            self._changed.notify_all()
        elif event is not None:
            fetch.events.append(event)
            fetch.unissued_count -= 1
            self._flying.append((event, chunk))
            self._changed.notify_all()
        else:
            self._arrive(chunk, link_id)

    def _copy(self, fetch: Fetch, chunk: Chunk, link_id: int) -> Event | None:
        """Copy one chunk; on a device, the event behind it."""
        if fetch.is_whole:
            return self._carrier.copy_whole(fetch, link_id)
        piece = fetch.pieces[chunk.index]
        source = self._sources(fetch.home, piece).index(link_id)
        return self._carrier.copy(fetch, piece, source, link_id, is_registered=self._links[link_id].is_registered)

    def _poll(self) -> bool:
        """Note which copies the device has finished; whether there was one."""
        arrived = [entry for entry in self._flying if self._backend.query(entry[0])]
        for entry in arrived:
            self._flying.remove(entry)
            self._arrive(entry[1], entry[1].link_id)
        return bool(arrived)

    def _arrive(self, chunk: Chunk, link_id: int) -> None:
        fetch = chunk.transfer.payload
        assert isinstance(fetch, Fetch)
        cause = chunk.transfer.cause
        self._leave(chunk, link_id)
        self._observer.moved(self._links[link_id].bank.name, chunk.byte_count, cause)
        is_last = self._scheduler.complete(chunk, self._clock())
        if is_last and fetch.error is None and not chunk.transfer.is_cancelled:
            self._land(fetch)
        # A link that was full may take more, and those that have replicas may take over what is queued for it.
        for other_id in chunk.link_ids:
            if self._links[other_id].has_hands:
                self._links[other_id].work.notify()
        self._changed.notify_all()

    def _land(self, fetch: Fetch) -> None:
        """Every byte of a slab is there: hold it against its digest, where that is due."""
        if self._backend.is_host and fetch.home.needs_check(fetch.expert_id):
            fetch.is_checking = True
            try:
                with self._unlocked():
                    error = _check(fetch)
            finally:
                fetch.is_checking = False
                self._changed.notify_all()
            if error is not None:
                self._fail(fetch, error, None)
                return
        fetch.has_landed = True
        self._observer.landed(fetch.transfer.cause, self._clock() - fetch.started_s)

    def _fail(self, fetch: Fetch, error: Exception, link_id: int | None) -> None:
        """A slab will not arrive, because of the bank of this link or, where that is not known, of any of its banks."""
        fetch.error = fetch.error or error
        names = fetch.home.bytes_by_bank([fetch.expert_id]) if link_id is None else [self._links[link_id].bank.name]
        for name in names:
            self._observer.failed(name)

    def _leave(self, chunk: Chunk, link_id: int) -> None:
        link = self._links[link_id]
        del link.in_flight[chunk]
        if not link.in_flight:
            self._observer.was_busy(link.bank.name, self._clock() - link.busy_since_s)
            link.is_reported_slow = False

    def _report_slow_links(self) -> None:
        now_s = self._clock()
        for link in self._links:
            since_s = now_s - min(link.in_flight.values(), default=now_s)
            if since_s > _SLOW_S and not link.is_reported_slow:
                link.is_reported_slow = True
                self._observer.failed(link.bank.name)
                logger.error(
                    "MoE offload: bank %s has not answered a read for %.0f s, a forward waits for it: see the "
                    "kernel's log",
                    *(link.bank.name, since_s),
                )

    @contextmanager
    def _unlocked(self) -> Iterator[None]:
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()


def _check(fetch: Fetch) -> Exception | None:
    try:
        fetch.home.check(fetch.expert_id, fetch.target)
    except Exception as error:  # noqa: BLE001  raised in whoever waits for the slab
        return error
    return None


def _limits(bank: Bank, in_flight_bytes_max: int) -> LinkLimits:
    """A chunk for each reader and for whoever helps, or what fills the link for its latency, where that is more."""
    profile = bank.profile
    return link_limits(
        profile.latency_s, profile.read_bytes_per_s, bank.reader_count, bank.chunk_bytes, in_flight_bytes_max
    )
