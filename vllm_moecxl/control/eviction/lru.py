"""Least recently used, and second-touch admission on top of it."""

from __future__ import annotations

import numpy as np

from vllm_moecxl.control.eviction.base import Epochs, ExpertIds, Mask, candidate_ids, least_recent


class LeastRecentlyUsed:
    """Evicts the slot whose last read lies furthest back; the lower slot id where two were read together."""

    def __init__(self, slot_count: int) -> None:
        """The stamps are all it needs."""

    def record(self, expert_ids: ExpertIds) -> None:
        """Nothing beyond the stamps."""

    def admit(self, slot_id: int, expert_id: int) -> None:
        """Nothing beyond the stamps."""

    def victim(self, candidates: Mask, last_read: Epochs) -> int:
        return least_recent(candidate_ids(candidates), last_read)


class SecondTouch:
    """LRU over experts that proved themselves; what was needed only once of late goes before any of them.

    A layer cannot run without its experts, so that every miss gets a slot. Admission means here: the newcomer is on
    probation, and the next victim, until it has been needed twice within the last `window` visits.

    Source: the second-hit caching rule of content networks (Maggs and Sitaraman 2015), and LRU-K with k = 2 (O'Neil
    et al. 1993), whose correlated reference period is one visit here.
    """

    def __init__(self, slot_count: int, expert_count: int, window: int = 64) -> None:
        self._window = window
        self._visit_count = 0
        self._expert_of = np.zeros(slot_count, dtype=np.intp)
        self._last_visit = np.full(expert_count, -window - 1, dtype=np.int64)
        self._visit_before = np.full(expert_count, -window - 1, dtype=np.int64)

    def record(self, expert_ids: ExpertIds) -> None:
        self._visit_count = now = self._visit_count + 1
        self._visit_before[expert_ids] = self._last_visit[expert_ids]
        self._last_visit[expert_ids] = now

    def admit(self, slot_id: int, expert_id: int) -> None:
        self._expert_of[slot_id] = expert_id

    def victim(self, candidates: Mask, last_read: Epochs) -> int:
        slot_ids = candidate_ids(candidates)
        on_probation = self._visit_before[self._expert_of[slot_ids]] < self._visit_count - self._window
        return least_recent(slot_ids[on_probation] if on_probation.any() else slot_ids, last_read)
