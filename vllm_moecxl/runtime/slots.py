"""The slots of one layer: what is in them, what is on its way, and who holds them. The forward and the sidecar share
them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.prefetch import LayerView
from vllm_moecxl.control.residency import Lease, Residency
from vllm_moecxl.data.devices.base import DeviceBackend, Event
from vllm_moecxl.data.fetch import Fetch
from vllm_moecxl.data.mover import Mover
from vllm_moecxl.data.slabs import Cells, Home
from vllm_moecxl.runtime.counters import Counters, PrefetchOutcome
from vllm_moecxl.types import Cause, SlotState

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class _Filling:
    """A slot that is being filled.

    Attributes:
        is_awaited: whether a forward will complete it. Others leave it alone then: between the arrival of its bytes and
            the forward's lease nobody may take it for a victim.
    """

    __slots__ = ("fetch", "is_awaited", "slot_id")

    def __init__(self, slot_id: int, fetch: Fetch, *, is_awaited: bool) -> None:
        self.slot_id = slot_id
        self.fetch = fetch
        self.is_awaited = is_awaited


class SlotCache:
    """See the module. The forward thread leases; any thread may prefetch.

    Args:
        residency: the slot table, guarded by this object's lock from now on.
        home: the slabs.
        cells: the slots' memory.
        mover: carries slabs.

    Attributes:
        unused: experts that were prefetched, and not needed since. Each leaves it once, useful, late or wasted.
    """

    def __init__(
        self, residency: Residency, home: Home, cells: Cells, backend: DeviceBackend, mover: Mover, counters: Counters
    ) -> None:
        self.residency = residency
        self.home = home
        self.cells = cells
        self._backend = backend
        self._mover = mover
        self._counters = counters
        self._lock = threading.Lock()
        self._filling: dict[int, _Filling] = {}
        #: Leases of kernels that the device has not finished, oldest first, each with the event behind its kernel.
        self._unfinished: deque[tuple[Event, Lease]] = deque()
        self.unused: set[int] = set()
        self._counted = dict.fromkeys(SlotState, 0)
        self._count()

    @property
    def slot_count(self) -> int:
        """Slots of the layer."""
        return self.residency.slot_count

    def lease(self, routes: npt.NDArray[np.uint32]) -> Lease | None:
        """Hold the slots of all these experts, or None unless every one is resident; see `Residency.lease`."""
        with self._lock:
            return self.residency.lease(routes)

    def visit(self, routes: npt.NDArray[np.uint32]) -> Lease | None:
        """A forward arrives: hold the slots of its experts, or None unless every one is resident."""
        with self._lock:
            lease = self.residency.visit(routes)
            if lease is None and self._filling:
                self._settle()  # what was prefetched may just have arrived
                lease = self.residency.lease(routes)
            if self.unused and lease is not None:
                self._use(routes.ravel().tolist())
            return lease

    def end(self, lease: Lease) -> None:
        """The kernel that reads a lease's slots has been launched: hold them until the device has run it."""
        with self._lock:
            self._end([lease])

    def look_up(self, distinct: Ids) -> tuple[Mask, int]:
        """What is there of the experts of a forward.

        Returns:
            [experts] bool, which experts of the layer are resident, and how many of `distinct` are on their way.
        """
        with self._lock:
            self._settle()
            resident = self.residency.resident_mask()
            if self.unused:
                self._use(distinct[resident[distinct]].tolist())
            pending_count = sum(expert_id in self._filling for expert_id in distinct[~resident[distinct]].tolist())
        return resident, pending_count

    def view(self) -> LayerView:
        """What is here, for whoever plans prefetches."""
        with self._lock:
            self._settle()
            pending = np.zeros(self.residency.expert_count, dtype=np.bool_)
            pending[list(self._filling)] = True
            free_count = self.residency.state_counts()[SlotState.FREE]
            return LayerView(self.residency.resident_mask(), pending, free_count, self.residency.slot_count)

    def lease_resident(self, distinct: Ids) -> tuple[Lease | None, Ids]:
        """Hold those of `distinct` that are resident now; which these are."""
        with self._lock:
            self._settle()
            cached = distinct[self.residency.resident_mask()[distinct]]
            return (self.residency.lease(cached.astype(np.uint32)) if cached.size else None), cached

    @contextmanager
    def hold_resident(self, expert_ids: Ids, keep: Mask, deadline: float) -> Iterator[None]:
        """Fetch what is missing of a pass and wait for it; all of it stays resident inside the context.

        Args:
            expert_ids: distinct, no more than there are slots.
            keep: [experts] bool, what the forward needs from here on.
            deadline: of the fetches.

        Raises:
            TransferError, IntegrityError: nothing of it can be had; what was on its way is given up.
        """
        holds, awaited = self._begin(expert_ids, keep, deadline)
        try:
            self._wait(awaited)
        except BaseException:
            with self._lock:
                self._give_up(awaited)
                self._end(holds)
            raise
        with self._lock:
            for expert_id, filling in awaited.items():
                del self._filling[expert_id]
                self.residency.complete_fill(filling.slot_id)
            if awaited:
                lease = self.residency.lease(np.fromiter(awaited, dtype=np.uint32))
                assert lease is not None
                holds.append(lease)
                self._count()
        try:
            yield
        finally:
            # Even if no kernel was launched: the device may still be filling the slots.
            with self._lock:
                self._end(holds)

    def absent(self) -> list[int]:
        """Experts of the layer that are neither here nor on their way."""
        with self._lock:
            self._settle()
            return self._absent(np.arange(self.residency.expert_count))

    def free_count(self) -> int:
        """Slots that nothing has been put into yet."""
        with self._lock:
            return self.residency.state_counts()[SlotState.FREE]

    def look_ahead(self, expert_ids: Ids, keep: Mask, deadline: float) -> None:
        """Begin to fetch what a later pass of this forward needs, as far as slots can be had without harm."""
        with self._lock:
            for expert_id in self._absent(expert_ids):
                if (slot_id := self.residency.begin_fill(expert_id, keep, is_urgent=False)) is None:
                    break
                self._fill(expert_id, slot_id, Cause.DEMAND, deadline, (), is_awaited=True)
            self._count()

    def relinquish(self) -> None:
        """The forward is over: what it began to fetch and did not come to need belongs to nobody."""
        with self._lock:
            for filling in self._filling.values():
                filling.is_awaited = False

    def prefetch(
        self, expert_ids: Collection[int], deadline: float, wanters: Collection[str] = (), keep: Mask | None = None
    ) -> int:
        """Begin to fetch experts that a later forward may need, and join those under way. Stops where no slot is to be
        had.

        Args:
            expert_ids: most valuable first.
            deadline: position of the layer's next forward.
            wanters: requests that they are for.
            keep: [experts] bool, what must not be evicted for them; nothing, where not given.

        Returns:
            How many fetches were begun.
        """
        if keep is None:
            keep = np.zeros(self.residency.expert_count, dtype=np.bool_)
        begun_count = 0
        with self._lock:
            self._settle()
            for expert_id in self._filling.keys() & expert_ids:
                self._mover.promote(self._filling[expert_id].fetch, Cause.PREFETCH, deadline, wanters)
            for expert_id in self._absent(np.fromiter(dict.fromkeys(expert_ids), dtype=np.int64)):
                if (slot_id := self.residency.begin_fill(expert_id, keep, is_urgent=False)) is None:
                    break
                self._fill(expert_id, slot_id, Cause.PREFETCH, deadline, wanters, is_awaited=False)
                self.unused.add(expert_id)
                begun_count += 1
            self._count()
        return begun_count

    def drop_prefetches(self, needed: Collection[int]) -> None:
        """The layer has been visited: stop bringing what was expected there and is not needed."""
        if not self.unused:  # the sidecar alone adds to them, and calls this
            return
        with self._lock:
            for expert_id, filling in self._filling.items():
                # What a forward waits for by now has left them.
                if expert_id in self.unused and expert_id not in needed:
                    self._mover.give_up(filling.fetch)
            self._settle()
            self._count()

    def settle(self) -> None:
        """Note what has arrived, what was given up, and which kernels have been run. Any thread, now and then."""
        with self._lock:
            self._settle()
            self._count()

    def _begin(self, expert_ids: Ids, keep: Mask, deadline: float) -> tuple[list[Lease], dict[int, _Filling]]:
        """Hold what is resident of a pass; begin to fetch, or join, the rest. On failure nothing has changed."""
        holds: list[Lease] = []
        awaited: dict[int, _Filling] = {}
        with self._lock:
            try:
                self._settle()
                resident = self.residency.resident_mask()[expert_ids]
                if resident.any():
                    hold = self.residency.lease(expert_ids[resident].astype(np.uint32))
                    assert hold is not None
                    holds.append(hold)
                    if self.unused:  # what arrived since the forward looked them up
                        self._use(expert_ids[resident].tolist())
                missing = expert_ids[~resident].tolist()
                # What is on its way comes first: none of it is given up for the others.
                missing.sort(key=self._filling.__contains__, reverse=True)
                # All slots are taken before any wait, so that no fill of this pass evicts another.
                for expert_id in missing:
                    filling = self._filling.get(expert_id)
                    if expert_id in self.unused:
                        self.unused.remove(expert_id)
                        self._counters.add({self._counters.prefetch[PrefetchOutcome.LATE]: 1})
                    if filling is not None and not self._mover.promote(filling.fetch, Cause.DEMAND, deadline):
                        self._give_up({expert_id: filling})
                        filling = None
                    if filling is None:
                        slot_id = self._take_slot(expert_id, keep, awaited)
                        filling = self._fill(expert_id, slot_id, Cause.DEMAND, deadline, (), is_awaited=True)
                    filling.is_awaited = True
                    awaited[expert_id] = filling
            except BaseException:
                self._give_up(awaited)
                self._end(holds)
                raise
            self._count()
        return holds, awaited

    def _wait(self, awaited: dict[int, _Filling]) -> None:
        if awaited:
            with self._counters.stalling():
                self._mover.wait([filling.fetch for filling in awaited.values()])

    def _fill(
        self,
        expert_id: int,
        slot_id: int,
        cause: Cause,
        deadline: float,
        wanters: Collection[str],
        *,
        is_awaited: bool,
    ) -> _Filling:
        try:
            fetch = self._mover.start(self.home, expert_id, self.cells.rows(slot_id), cause, deadline, wanters)
        except BaseException:
            self.residency.abort_fill(slot_id)
            raise
        filling = self._filling[expert_id] = _Filling(slot_id, fetch, is_awaited=is_awaited)
        return filling

    def _take_slot(self, expert_id: int, keep: Mask, awaited: Collection[int]) -> int:
        """A slot for an expert that a pass cannot do without: the pass has a right to as many as there are."""
        while (slot_id := self.residency.begin_fill(expert_id, keep)) is None:
            if self._unfinished:
                self._backend.synchronize(self._unfinished[0][0])
                self._release_finished()
                continue
            # Slots that are being filled for later: the one that is farthest from being needed.
            others = [other for other in self._filling if other not in awaited]
            assert others, "a pass needs no more experts than there are slots"
            victim = max(others, key=lambda other: self._urgency(self._filling[other]))
            self._give_up({victim: self._filling[victim]})
        return slot_id

    @staticmethod
    def _urgency(filling: _Filling) -> tuple[int, float]:
        transfer = filling.fetch.transfer
        return transfer.cause, transfer.deadline

    def _absent(self, expert_ids: Ids) -> list[int]:
        missing = expert_ids[~self.residency.resident_mask()[expert_ids]]
        return [expert_id for expert_id in missing.tolist() if expert_id not in self._filling]

    def _settle(self) -> None:
        self._release_finished()
        if self._filling:
            self._mover.poll()
        for expert_id, filling in list(self._filling.items()):
            if filling.is_awaited:
                continue
            if filling.fetch.has_landed:
                del self._filling[expert_id]
                self.residency.complete_fill(filling.slot_id)
            elif filling.fetch.is_over:
                self._give_up({expert_id: filling})

    def _give_up(self, fillings: dict[int, _Filling]) -> None:
        """Free slots whose fills will not be completed, once nothing writes to them any more."""
        self._mover.cancel([filling.fetch for filling in fillings.values()])
        for expert_id, filling in fillings.items():
            del self._filling[expert_id]
            self.residency.abort_fill(filling.slot_id)
        self._count()

    def _end(self, leases: Sequence[Lease]) -> None:
        """End leases once the device has done what it was told so far."""
        if self._backend.is_host:
            for lease in leases:
                self.residency.release(lease)
        elif leases:
            event = self._backend.record(self._backend.compute_stream())
            self._unfinished.extend((event, lease) for lease in leases)
            self._release_finished()

    def _release_finished(self) -> None:
        while self._unfinished and self._backend.query(self._unfinished[0][0]):
            self.residency.release(self._unfinished.popleft()[1])

    def _use(self, expert_ids: Collection[int]) -> None:
        """A forward finds these in their slots."""
        if used := self.unused.intersection(expert_ids):
            self.unused -= used
            self._counters.add({self._counters.prefetch[PrefetchOutcome.USEFUL]: len(used)})

    def _count(self) -> None:
        """Move the gauge of slot states by what changed in this layer, and see which prefetches were for nothing."""
        counts = self.residency.state_counts()
        amounts = {
            self._counters.slots[state]: counts[state] - self._counted[state]
            for state in SlotState
            if counts[state] != self._counted[state]
        }
        self._counted = counts
        if self.unused:
            resident = self.residency.resident_mask()
            gone = {one for one in self.unused if not resident[one] and one not in self._filling}
            self.unused -= gone
            amounts[self._counters.prefetch[PrefetchOutcome.WASTED]] = len(gone)
        if amounts:
            self._counters.add(amounts)
