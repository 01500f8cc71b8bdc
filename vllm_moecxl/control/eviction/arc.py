"""Adaptive replacement: two LRU lists whose shares follow the ghosts of what was evicted too early."""

from __future__ import annotations

import numpy as np

from vllm_moecxl.control.eviction.base import Epochs, ExpertIds, Mask, candidate_ids, least_recent


class AdaptiveReplacement:
    """Experts seen once of late and experts seen again, each in LRU order, and a target for how many of the former.

    An expert that comes back soon after it was evicted from a list moves the target in favour of that list. All experts
    of a visit are read together: which of them came first means nothing, and what the visit needs is no candidate.

    Source: Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003.
    """

    def __init__(self, slot_count: int, expert_count: int) -> None:
        self._slot_count = slot_count
        #: The slots that those seen once should have (the paper's p).
        self._once_target = 0.0
        self._expert_of = np.full(slot_count, -1, dtype=np.intp)
        self._is_resident = np.zeros(expert_count, dtype=np.bool_)
        self._is_frequent = np.zeros(expert_count, dtype=np.bool_)
        #: Evicted from either list, oldest first (the paper's B1 and B2).
        self._once_ghosts: dict[int, None] = {}
        self._frequent_ghosts: dict[int, None] = {}

    def record(self, expert_ids: ExpertIds) -> None:
        self._is_frequent[expert_ids] |= self._is_resident[expert_ids]

    def admit(self, slot_id: int, expert_id: int) -> None:
        if (evicted := int(self._expert_of[slot_id])) >= 0:
            self._bury(evicted)
        self._expert_of[slot_id] = expert_id
        self._is_resident[expert_id] = True
        once_count, frequent_count = len(self._once_ghosts), len(self._frequent_ghosts)
        self._is_frequent[expert_id] = expert_id in self._once_ghosts or expert_id in self._frequent_ghosts
        if expert_id in self._once_ghosts:
            step = max(1.0, frequent_count / once_count)
            self._once_target = min(float(self._slot_count), self._once_target + step)
            del self._once_ghosts[expert_id]
        elif expert_id in self._frequent_ghosts:
            self._once_target = max(0.0, self._once_target - max(1.0, once_count / frequent_count))
            del self._frequent_ghosts[expert_id]

    def victim(self, candidates: Mask, last_read: Epochs) -> int:
        slot_ids = candidate_ids(candidates)
        is_frequent = self._is_frequent[self._expert_of]
        takes_once = np.count_nonzero(~is_frequent) > self._once_target
        preferred = slot_ids[is_frequent[slot_ids] != takes_once]
        return least_recent(preferred if preferred.size else slot_ids, last_read)

    def _bury(self, expert_id: int) -> None:
        self._is_resident[expert_id] = False
        ghosts = self._frequent_ghosts if self._is_frequent[expert_id] else self._once_ghosts
        ghosts[expert_id] = None
        if len(ghosts) > self._slot_count:
            del ghosts[next(iter(ghosts))]
