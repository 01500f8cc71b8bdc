"""Which slot makes room: a small protocol and the policies behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vllm_moecxl.config import EVICTIONS

SlotIds = npt.NDArray[np.integer]
Epochs = npt.NDArray[np.int64]


class EvictionPolicy(Protocol):
    """Names the victims of one layer. One policy object serves one layer.

    Recency costs a policy nothing: leases stamp the slots that they read, and `victim` is given the stamps.
    """

    def record(self, slot_ids: SlotIds) -> None:
        """One forward reads these slots. Slots may repeat; the order within one call means nothing."""

    def admit(self, slot_id: int, expert_id: int) -> None:
        """`slot_id` now holds `expert_id`."""

    def victim(self, candidates: npt.NDArray[np.bool_], last_read: Epochs) -> int:
        """The slot to evict.

        Args:
            candidates: [slots] bool, at least one is True.
            last_read: [slots] int64, the epoch in which each slot was last read or filled; larger is later.
        """


class LeastRecentlyUsed:
    """Evicts the slot whose last read lies furthest back; the lower slot id where two were read together."""

    def __init__(self, slot_count: int) -> None:
        """The stamps are all it needs."""

    def record(self, slot_ids: SlotIds) -> None:
        """Nothing beyond the stamps."""

    def admit(self, slot_id: int, expert_id: int) -> None:
        """Nothing beyond the stamps."""

    def victim(self, candidates: npt.NDArray[np.bool_], last_read: Epochs) -> int:
        slot_ids = np.flatnonzero(candidates)
        assert slot_ids.size, "an eviction needs at least one candidate"
        return int(slot_ids[last_read[slot_ids].argmin()])


POLICIES: dict[str, Callable[[int], EvictionPolicy]] = {"lru": LeastRecentlyUsed}
assert tuple(POLICIES) == EVICTIONS
