"""What an eviction policy is told, what it answers, and what most policies share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np
import numpy.typing as npt

Epochs = npt.NDArray[np.int64]
ExpertIds = npt.NDArray[np.integer]
Mask = npt.NDArray[np.bool_]


class EvictionPolicy(Protocol):
    """Names the victims of one layer. One policy object serves one layer.

    Recency of slots costs a policy nothing: leases stamp the slots that they read, and `victim` is given the stamps.
    """

    def record(self, expert_ids: ExpertIds) -> None:
        """A forward visits the layer and needs these experts, all at once. On the hot path: at most 1.5 us.

        Called once a visit, before anything is evicted for it.

        Args:
            expert_ids: at least one, of any shape; may repeat, the order means nothing, and the array is the caller's.
        """

    def admit(self, slot_id: int, expert_id: int) -> None:
        """`slot_id` now holds `expert_id`, and no longer what it held before."""

    def victim(self, candidates: Mask, last_read: Epochs) -> int:
        """The slot to evict. Asking changes nothing that a later answer depends on.

        Args:
            candidates: [slots] bool, at least one is True.
            last_read: [slots] int64, the epoch in which each slot was last read or filled; larger is later.
        """


def candidate_ids(candidates: Mask) -> npt.NDArray[np.intp]:
    """[candidates] the slots that may be evicted, at least one."""
    slot_ids = candidates.nonzero()[0]
    assert slot_ids.size, "an eviction needs at least one candidate"
    return slot_ids


def least_recent(slot_ids: npt.NDArray[np.intp], last_read: Epochs) -> int:
    """The slot whose last read lies furthest back; the first one of those read together."""
    return int(slot_ids[last_read[slot_ids].argmin()])


class ByValue(ABC):
    """Keeps a value of every expert, resident or not; evicts the lowest, and the least recent of equals.

    Args:
        slot_count: slots of the layer.
        expert_count: experts of the layer.
    """

    def __init__(self, slot_count: int, expert_count: int) -> None:
        self.expert_count = expert_count
        #: What is in each slot; of a slot that was never filled, nobody asks.
        self._expert_of = np.zeros(slot_count, dtype=np.intp)

    @abstractmethod
    def record(self, expert_ids: ExpertIds) -> None:
        """See `EvictionPolicy.record`."""

    @abstractmethod
    def values(self) -> npt.NDArray[np.floating] | npt.NDArray[np.integer]:
        """[experts] what keeping each is worth."""

    def admit(self, slot_id: int, expert_id: int) -> None:
        self._expert_of[slot_id] = expert_id

    def victim(self, candidates: Mask, last_read: Epochs) -> int:
        slot_ids = candidate_ids(candidates)
        values = self.values()[self._expert_of[slot_ids]]
        return least_recent(slot_ids[values == values[values.argmin()]], last_read)
