"""The offline bound: evicts what is needed again last, which only a replay can know."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.eviction.base import ByValue, ExpertIds


class Belady(ByValue):
    """Optimal for demand fetches, also where a visit needs several experts at once: these are no candidates.

    Source: Belady, "A Study of Replacement Algorithms for Virtual-Storage Computers", IBM Systems Journal 5 (1966).

    Args:
        future: [visits, k] int, what each visit is going to need, in the order in which they will be recorded.
    """

    def __init__(self, slot_count: int, expert_count: int, future: ExpertIds) -> None:
        super().__init__(slot_count, expert_count)
        self._visit = -1
        self._values = -_next_uses(future, expert_count)

    def record(self, expert_ids: ExpertIds) -> None:
        self._visit += 1

    def values(self) -> npt.NDArray[np.int32]:
        values: npt.NDArray[np.int32] = self._values[self._visit]
        return values


def _next_uses(future: ExpertIds, expert_count: int) -> npt.NDArray[np.int32]:
    """[visits, experts] the first visit after each that needs the expert."""
    visit_count = len(future)
    next_uses = np.full((visit_count + 1, expert_count), np.iinfo(np.int32).max, dtype=np.int32)
    used = np.full((visit_count, expert_count), np.iinfo(np.int32).max, dtype=np.int32)
    np.put_along_axis(used, future.astype(np.intp), np.arange(visit_count, dtype=np.int32)[:, None], axis=1)
    next_uses[:-1] = np.minimum.accumulate(used[::-1], axis=0)[::-1]
    return next_uses[1:]
