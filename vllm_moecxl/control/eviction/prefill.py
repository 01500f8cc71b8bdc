"""Keeps what decode needs from being displaced by prompts."""

from __future__ import annotations

import numpy as np

from vllm_moecxl.control.eviction.base import Epochs, EvictionPolicy, ExpertIds, Mask, candidate_ids, least_recent

#: A visit that needs this many times the experts of a usual one is a prompt's. Source: a planning figure; decode steps
#: of one batch size differ far less, and a prompt of 32 tokens needs nine times what a token does.
_WIDE_FACTOR = 2.0
#: Weight of the latest visit in what is usual.
_USUAL_STEP = 1 / 32


class PrefillProtecting:
    """Hides wide visits from another policy; what such a visit brought in is evicted before all else.

    Prompts that go through the layer buffer leave the slots as they are anyway; this is about those that do not.

    Source: the scan resistance of Johnson and Shasha, "2Q", VLDB 1994.
    """

    def __init__(self, slot_count: int, expert_count: int, inner: EvictionPolicy) -> None:
        self._inner = inner
        self._usual_width = float(slot_count)
        self._is_wide = False
        self._needed = np.zeros(expert_count, dtype=np.bool_)
        self._expert_of = np.zeros(slot_count, dtype=np.intp)
        #: Brought in by a wide visit, and not needed by a narrow one since.
        self._is_guest = np.zeros(expert_count, dtype=np.bool_)

    def record(self, expert_ids: ExpertIds) -> None:
        width_max = _WIDE_FACTOR * self._usual_width
        width: float = expert_ids.size
        if width > width_max:  # perhaps only for its repeats
            self._needed.fill(False)
            self._needed[expert_ids] = True
            width = int(np.count_nonzero(self._needed))
        # One prompt among many tokens hardly moves what is usual; a batch that has grown soon does.
        self._usual_width += (min(width, width_max) - self._usual_width) * _USUAL_STEP
        self._is_wide = width > width_max
        if not self._is_wide:
            self._is_guest[expert_ids] = False
            self._inner.record(expert_ids)

    def admit(self, slot_id: int, expert_id: int) -> None:
        self._expert_of[slot_id] = expert_id
        self._is_guest[expert_id] = self._is_wide
        self._inner.admit(slot_id, expert_id)

    def victim(self, candidates: Mask, last_read: Epochs) -> int:
        slot_ids = candidate_ids(candidates)
        guests = slot_ids[self._is_guest[self._expert_of[slot_ids]]]
        return least_recent(guests, last_read) if guests.size else self._inner.victim(candidates, last_read)
