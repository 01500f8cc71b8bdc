"""A layer buffer in virtual time: the same steps as the engine's `runtime.layer_buffer`."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from vllm_moecxl.control.simulator.mover import Fetch, Mover
from vllm_moecxl.control.simulator.slots import PrefetchCounts, Slots
from vllm_moecxl.types import Cause


class LayerBuffer:
    """A row for every expert of a layer, which several layers share.

    Args:
        counts: of what was brought ahead of its forward.
    """

    def __init__(self, mover: Mover, counts: PrefetchCounts) -> None:
        self._mover = mover
        self._counts = counts
        self._owner: Slots | None = None
        self._fetches: dict[int, Fetch] = {}
        self._ahead: set[int] = set()

    @property
    def expected_count(self) -> int:
        """Slabs brought ahead of which nobody knows yet what they were good for."""
        return len(self._ahead)

    def belongs_to(self, slots: Slots) -> bool:
        """Whether what is in here are this layer's slabs."""
        return self._owner is slots

    def claim(self, slots: Slots) -> None:
        """Make the buffer a layer's own; what another layer had in it, or had on the way, is given up."""
        if self._owner is not slots:
            self._mover.cancel(list(self._fetches.values()))
            self._waste(self._ahead)
            self._fetches.clear()
            self._owner = slots

    def bring(self, expert_ids: Sequence[int], cause: Cause, deadline: float) -> None:
        """Begin to fetch slabs of the owner that are not here; those on their way become as urgent as this."""
        assert self._owner is not None
        for expert_id in expert_ids:
            if (fetch := self._fetches.get(expert_id)) is not None:
                if self._mover.promote(fetch, cause, deadline):
                    continue
                # It was given up as not needed: what is begun now is another fetch.
                self._mover.cancel([fetch])
                self._waste(self._ahead & {expert_id})
            fine, whole = self._owner.chunks[expert_id]
            is_ahead = cause is Cause.PREFETCH
            chunks = fine if is_ahead else whole
            self._fetches[expert_id] = self._mover.start(chunks, cause, deadline, is_ahead=is_ahead)
            if is_ahead:
                self._ahead.add(expert_id)
                self._counts.issued += 1

    def drop_all_but(self, expert_ids: Collection[int]) -> None:
        """Stop bringing what was brought ahead and turns out not to be needed; what has come by now stays."""
        for expert_id in self._ahead.difference(expert_ids):
            if not self._fetches[expert_id].has_landed:
                self._mover.give_up(self._fetches[expert_id])

    def take(self, expert_ids: Collection[int]) -> None:
        """Copy slabs that are in the layer's slots; the caller lets the time pass that it takes."""
        brought = [expert_id for expert_id in expert_ids if expert_id in self._fetches]
        self._mover.cancel([self._fetches.pop(expert_id) for expert_id in brought])
        self._waste(self._ahead.intersection(brought))

    def wait(self, expert_ids: Collection[int]) -> None:
        """Let time pass until these slabs are here."""
        if not expert_ids:
            return
        expected = self._ahead.intersection(expert_ids)
        useful_count = sum(self._fetches[expert_id].has_landed for expert_id in expected)
        self._ahead -= expected
        self._counts.useful += useful_count
        self._counts.late += len(expected) - useful_count
        self._mover.wait([self._fetches[expert_id] for expert_id in expert_ids])

    def _waste(self, expert_ids: set[int]) -> None:
        self._counts.wasted += len(expert_ids)
        self._ahead = self._ahead - expert_ids
