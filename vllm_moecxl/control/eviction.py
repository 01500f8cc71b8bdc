"""Which slot makes room: a small protocol and the policies behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vllm_moecxl.config import EVICTIONS

SlotIds = npt.NDArray[np.integer]


class EvictionPolicy(Protocol):
    """Sees every access of one layer's slots and names victims. One policy object serves one layer."""

    def record(self, slot_ids: SlotIds) -> None:
        """One forward read these slots. Slots may repeat; the order within one call means nothing."""

    def admit(self, slot_id: int, expert_id: int) -> None:
        """`slot_id` now holds `expert_id`, fetched for use in this forward."""

    def victim(self, candidates: npt.NDArray[np.bool_]) -> int:
        """The slot to evict among `candidates` ([slots] bool, at least one is True)."""


class LeastRecentlyUsed:
    """Evicts the slot whose last read lies furthest back; the lower slot id where two were read together."""

    def __init__(self, slot_count: int) -> None:
        self._reads = 0
        self._last_read = np.zeros(slot_count, dtype=np.int64)

    def record(self, slot_ids: SlotIds) -> None:
        self._reads += 1
        self._last_read[slot_ids] = self._reads

    def admit(self, slot_id: int, expert_id: int) -> None:
        self._reads += 1
        self._last_read[slot_id] = self._reads

    def victim(self, candidates: npt.NDArray[np.bool_]) -> int:
        slot_ids = np.flatnonzero(candidates)
        assert slot_ids.size, "an eviction needs at least one candidate"
        return int(slot_ids[self._last_read[slot_ids].argmin()])


POLICIES: dict[str, Callable[[int], EvictionPolicy]] = {"lru": LeastRecentlyUsed}
assert tuple(POLICIES) == EVICTIONS
