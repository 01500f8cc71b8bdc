"""The layer buffers: a row for every expert of a layer, shared by the layers of one shape.

A wide forward runs from a buffer in a single pass and leaves the slots as they are. Where there are two, layers use
them by turns: the next layer's experts are copied into the other one meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from vllm_moecxl.data.devices.base import DeviceBackend, Event
from vllm_moecxl.data.fetch import Fetch
from vllm_moecxl.data.mover import Mover
from vllm_moecxl.data.slabs import Cells, Home, LayerCells
from vllm_moecxl.runtime.counters import Counters, PrefetchOutcome
from vllm_moecxl.types import Cause


class LayerBuffer:
    """One of them. Only the forward thread uses it.

    Args:
        cells: a row for every expert.
    """

    def __init__(self, cells: LayerCells, backend: DeviceBackend, mover: Mover, counters: Counters) -> None:
        self.cells = cells
        self._backend = backend
        self._mover = mover
        self._counters = counters
        self._owner: Home | None = None
        #: By expert, the fetch that brought, or brings, its slab here.
        self._fetches: dict[int, Fetch] = {}
        #: Experts that were fetched before anybody needed them, and were not needed yet.
        self._ahead: set[int] = set()
        #: Behind the last kernel that read the buffer.
        self._read: Event | None = None

    def belongs_to(self, home: Home) -> bool:
        """Whether what is in here are this layer's slabs."""
        return self._owner is home

    def claim(self, home: Home) -> None:
        """Make the buffer a layer's own; what another layer had in it, or had on the way, is given up."""
        if self._owner is not home:
            self.abandon()
            self._owner = home

    def bring(self, expert_ids: Sequence[int], cause: Cause, deadline: float) -> None:
        """Begin to fetch slabs of the owner that are not here; those on their way become as urgent as this."""
        assert self._owner is not None
        for expert_id in expert_ids:
            if (fetch := self._fetches.get(expert_id)) is not None:
                if self._mover.promote(fetch, cause, deadline):
                    continue
                # Nobody waited when it failed: whoever does now has a right to another attempt.
                self._mover.cancel([fetch])
            self._fetches[expert_id] = self._mover.start(
                self._owner, expert_id, self.cells.rows(expert_id), cause, deadline, after=self._read
            )
            if cause is Cause.PREFETCH:
                self._ahead.add(expert_id)

    def drop_all_but(self, expert_ids: Collection[int]) -> None:
        """Stop bringing what was brought ahead and turns out not to be needed; what has come by now stays."""
        for expert_id in self._ahead.difference(expert_ids):
            if not self._fetches[expert_id].has_landed:
                self._mover.give_up(self._fetches[expert_id])

    def take(self, cells: Cells, from_ids: list[int], expert_ids: list[int]) -> None:
        """Copy slabs that are in the layer's slots, in order with the kernels of the calling thread."""
        # They may have been brought ahead before they came into a slot: nothing else may write their rows now.
        brought = [expert_id for expert_id in expert_ids if expert_id in self._fetches]
        self._mover.cancel([self._fetches.pop(expert_id) for expert_id in brought])
        self._count_wasted(self._ahead.intersection(brought))
        self.cells.take(cells, from_ids, expert_ids)

    def wait(self, expert_ids: Collection[int]) -> None:
        """Return when kernels that are launched from now on find these slabs.

        Raises:
            TransferError, IntegrityError: one of them cannot be had; the buffer is nobody's then.
        """
        if not expert_ids:
            return
        fetches = [self._fetches[expert_id] for expert_id in expert_ids]
        expected = self._ahead.intersection(expert_ids)
        useful_count = sum(self._fetches[expert_id].has_landed for expert_id in expected)
        self._ahead -= expected
        self._counters.add(
            {
                self._counters.prefetch[PrefetchOutcome.USEFUL]: useful_count,
                self._counters.prefetch[PrefetchOutcome.LATE]: len(expected) - useful_count,
            }
        )
        try:
            with self._counters.stalling():
                self._mover.wait(fetches)
        except BaseException:
            self.abandon()
            raise

    def was_read(self) -> None:
        """A kernel that reads the buffer has been launched."""
        if not self._backend.is_host:
            self._read = self._backend.record(self._backend.compute_stream())

    def abandon(self) -> None:
        """Give up everything in here."""
        self._owner = None
        self._mover.cancel(list(self._fetches.values()))
        self._count_wasted(self._ahead)
        self._fetches.clear()

    def _count_wasted(self, expert_ids: set[int]) -> None:
        self._counters.add({self._counters.prefetch[PrefetchOutcome.WASTED]: len(expert_ids)})
        self._ahead = self._ahead - expert_ids
