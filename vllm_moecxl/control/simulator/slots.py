"""The slots of one layer in virtual time: the same steps as the engine's `runtime.slots`, without threads."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.prefetch import LayerView
from vllm_moecxl.control.residency import Lease, Residency
from vllm_moecxl.control.simulator.mover import Chunks, Fetch, Mover
from vllm_moecxl.types import Cause, SlotState

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass
class PrefetchCounts:
    """What became of the slabs that were fetched before they were asked for.

    Attributes:
        issued: fetches that were begun.
        useful: were there in time.
        late: were asked for while on their way.
        wasted: made room, or were given up, before anybody asked.
    """

    issued: int = 0
    useful: int = 0
    late: int = 0
    wasted: int = 0


class _Filling:
    """A slot that is being filled; see `runtime.slots`."""

    __slots__ = ("fetch", "is_awaited", "slot_id")

    def __init__(self, slot_id: int, fetch: Fetch, *, is_awaited: bool) -> None:
        self.slot_id = slot_id
        self.fetch = fetch
        self.is_awaited = is_awaited


class Slots:
    """See the module.

    Args:
        residency: the slot table.
        chunks: per expert, how its slab is cut: as the engine does, and for a demand.
        counts: of all layers together.
    """

    def __init__(
        self, residency: Residency, chunks: Sequence[tuple[Chunks, Chunks]], mover: Mover, counts: PrefetchCounts
    ) -> None:
        self.residency = residency
        self.chunks = chunks
        self._mover = mover
        self._counts = counts
        self._filling: dict[int, _Filling] = {}
        #: Experts that were prefetched and not asked for since.
        self._expected: set[int] = set()

    @property
    def expected_count(self) -> int:
        """Prefetched slabs of which nobody knows yet what they were good for."""
        return len(self._expected)

    @property
    def slot_count(self) -> int:
        """Slots of the layer."""
        return self.residency.slot_count

    def lease(self, routes: npt.NDArray[np.uint32]) -> Lease | None:
        """Hold the slots of all these experts, or None unless every one is resident."""
        return self.residency.lease(routes)

    def visit(self, routes: npt.NDArray[np.uint32]) -> Lease | None:
        """A forward arrives: hold the slots of its experts, or None unless every one is resident."""
        lease = self.residency.visit(routes)
        if lease is None and self._filling:
            self._settle()  # what was prefetched may just have arrived
            lease = self.residency.lease(routes)
        if self._expected and lease is not None:
            self._meet(routes.ravel().tolist())
        return lease

    def end(self, lease: Lease) -> None:
        """The device has run the kernel that reads a lease's slots."""
        self.residency.release(lease)

    def look_up(self, distinct: Ids) -> tuple[Mask, int]:
        """[experts] bool, what is resident; and how many of `distinct` are on their way."""
        self._settle()
        resident = self.residency.resident_mask()
        pending_count = sum(expert_id in self._filling for expert_id in distinct[~resident[distinct]].tolist())
        if self._expected:
            self._meet(distinct.tolist())
        return resident, pending_count

    def lease_resident(self, distinct: Ids) -> tuple[Lease | None, Ids]:
        """Hold those of `distinct` that are resident now; which these are."""
        self._settle()
        cached = distinct[self.residency.resident_mask()[distinct]]
        return (self.residency.lease(cached.astype(np.uint32)) if cached.size else None), cached

    @contextmanager
    def hold_resident(self, expert_ids: Ids, keep: Mask, deadline: float) -> Iterator[None]:
        """Fetch what is missing of a pass and wait for it; all of it stays resident inside the context."""
        holds, awaited = self._begin(expert_ids, keep, deadline)
        if awaited:
            self._mover.wait([filling.fetch for filling in awaited.values()])
            for expert_id, filling in awaited.items():
                del self._filling[expert_id]
                self.residency.complete_fill(filling.slot_id)
            lease = self.residency.lease(np.fromiter(awaited, dtype=np.uint32))
            assert lease is not None
            holds.append(lease)
        yield
        for hold in holds:
            self.residency.release(hold)

    def absent(self) -> list[int]:
        """Experts of the layer that are neither here nor on their way."""
        self._settle()
        return self._absent(np.arange(self.residency.expert_count))

    def free_count(self) -> int:
        """Slots that nothing has been put into yet."""
        return self.residency.state_counts()[SlotState.FREE]

    def view(self) -> LayerView:
        """What is here, for whoever plans prefetches."""
        self._settle()
        pending = np.zeros(self.residency.expert_count, dtype=np.bool_)
        pending[list(self._filling)] = True
        resident, slot_count = self.residency.resident_mask(), self.residency.slot_count
        free_count = slot_count - int(np.count_nonzero(resident)) - len(self._filling)
        return LayerView(resident, pending, free_count, slot_count)

    def look_ahead(self, expert_ids: Ids, keep: Mask, deadline: float) -> None:
        """Begin to fetch what a later pass of this forward needs, as far as slots can be had without harm."""
        for expert_id in self._absent(expert_ids):
            if (slot_id := self._take(expert_id, keep, is_urgent=False)) is None:
                break
            self._fill(expert_id, slot_id, Cause.DEMAND, deadline, (), is_awaited=True)

    def prefetch(
        self, expert_ids: Collection[int], deadline: float, wanters: Collection[str] = (), keep: Mask | None = None
    ) -> int:
        """Begin to fetch experts that a later forward may need, and join those under way; how many were begun.

        Args:
            expert_ids: most valuable first.
            keep: [experts] bool, what must not be evicted for them; nothing, where not given.
        """
        if keep is None:
            keep = np.zeros(self.residency.expert_count, dtype=np.bool_)
        begun_count = 0
        self._settle()
        for expert_id in self._filling.keys() & expert_ids:
            self._mover.promote(self._filling[expert_id].fetch, Cause.PREFETCH, deadline, wanters)
        for expert_id in self._absent(np.fromiter(dict.fromkeys(expert_ids), dtype=np.int64)):
            if (slot_id := self._take(expert_id, keep, is_urgent=False)) is None:
                break
            self._fill(expert_id, slot_id, Cause.PREFETCH, deadline, wanters, is_awaited=False)
            self._expected.add(expert_id)
            begun_count += 1
        self._counts.issued += begun_count
        return begun_count

    def drop_prefetches(self, needed: Collection[int]) -> None:
        """The layer has been visited: stop bringing what was expected there and is not needed."""
        if not self._expected:
            return
        for expert_id in self._expected.difference(needed):
            filling = self._filling.get(expert_id)
            if filling is not None and not filling.is_awaited:
                self._mover.give_up(filling.fetch)
        self._settle()

    def settle(self) -> None:
        """Note what has arrived, and what was given up."""
        self._settle()

    def check(self) -> None:
        """Assert every invariant; for tests."""
        self.residency.check()
        filling_count = self.residency.state_counts()[SlotState.FILLING]
        assert filling_count == len(self._filling)
        for expert_id in self._expected:
            assert expert_id in self._filling or self.residency.resident_mask()[expert_id]

    def _meet(self, expert_ids: Collection[int]) -> None:
        """A forward asks for experts, some of them prefetched."""
        for expert_id in self._expected.intersection(expert_ids):
            self._expected.remove(expert_id)
            if expert_id in self._filling:
                self._counts.late += 1
            else:
                self._counts.useful += 1

    def _begin(self, expert_ids: Ids, keep: Mask, deadline: float) -> tuple[list[Lease], dict[int, _Filling]]:
        holds: list[Lease] = []
        awaited: dict[int, _Filling] = {}
        self._settle()
        resident = self.residency.resident_mask()[expert_ids]
        if resident.any():
            hold = self.residency.lease(expert_ids[resident].astype(np.uint32))
            assert hold is not None
            holds.append(hold)
        # All slots are taken before any wait, so that no fill of this pass evicts another.
        for expert_id in expert_ids[~resident].tolist():
            filling = self._filling.get(expert_id)
            if filling is not None and not self._mover.promote(filling.fetch, Cause.DEMAND, deadline):
                self._give_up(expert_id)
                filling = None
            if filling is None:
                slot_id = self._take_slot(expert_id, keep, awaited)
                filling = self._fill(expert_id, slot_id, Cause.DEMAND, deadline, (), is_awaited=True)
            filling.is_awaited = True
            awaited[expert_id] = filling
        return holds, awaited

    def _fill(
        self, expert_id: int, slot_id: int, cause: Cause, deadline: float, wanters: Collection[str], *, is_awaited: bool
    ) -> _Filling:
        fine, whole = self.chunks[expert_id]
        fetch = self._mover.start(whole if cause is Cause.DEMAND else fine, cause, deadline, wanters)
        filling = self._filling[expert_id] = _Filling(slot_id, fetch, is_awaited=is_awaited)
        return filling

    def _take(self, expert_id: int, keep: Mask, *, is_urgent: bool) -> int | None:
        """A slot for an expert, if one can be had; what was prefetched into it in vain is noted."""
        slot_id = self.residency.begin_fill(expert_id, keep, is_urgent=is_urgent)
        if self._expected:
            resident = self.residency.resident_mask()
            gone = {one for one in self._expected if not resident[one] and one not in self._filling}
            self._expected -= gone
            self._counts.wasted += len(gone)
        return slot_id

    def _take_slot(self, expert_id: int, keep: Mask, awaited: Collection[int]) -> int:
        """A slot for an expert that a pass cannot do without: the pass has a right to as many as there are."""
        while (slot_id := self._take(expert_id, keep, is_urgent=True)) is None:
            others = [other for other in self._filling if other not in awaited]
            assert others, "a pass needs no more experts than there are slots"
            self._give_up(max(others, key=self._urgency))
        return slot_id

    def _urgency(self, expert_id: int) -> tuple[int, float]:
        transfer = self._filling[expert_id].fetch.transfer
        return transfer.cause, transfer.deadline

    def _absent(self, expert_ids: Ids) -> list[int]:
        missing = expert_ids[~self.residency.resident_mask()[expert_ids]]
        return [expert_id for expert_id in missing.tolist() if expert_id not in self._filling]

    def _settle(self) -> None:
        if not self._filling:
            return
        for expert_id, filling in list(self._filling.items()):
            if filling.is_awaited:
                continue
            if filling.fetch.has_landed:
                del self._filling[expert_id]
                self.residency.complete_fill(filling.slot_id)
            elif filling.fetch.is_over:
                self._give_up(expert_id)

    def _give_up(self, expert_id: int) -> None:
        filling = self._filling[expert_id]
        self._mover.cancel([filling.fetch])
        del self._filling[expert_id]
        self.residency.abort_fill(filling.slot_id)
        if expert_id in self._expected:
            self._expected.remove(expert_id)
            self._counts.wasted += 1
