"""Policies that count uses and forget them: LFU with ageing, LFRU, and classes of counts with LRU inside."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.eviction.base import ByValue, Epochs, ExpertIds, Mask, candidate_ids, least_recent

#: Units grow with every visit; before they overflow, all counts are brought down again.
_UNIT_MAX = 1e30


class LeastFrequentlyUsed(ByValue):
    """Counts visits that need an expert, and halves all counts every `period` visits.

    Source: ageing as in Arlitt et al., "Evaluating Content Management Techniques for Web Proxy Caches" (1999).
    """

    def __init__(self, slot_count: int, expert_count: int, period: int = 256) -> None:
        super().__init__(slot_count, expert_count)
        self._period = period
        self._left = period
        self._counts = np.zeros(expert_count)

    def record(self, expert_ids: ExpertIds) -> None:
        self._counts[expert_ids] += 1.0
        self._left -= 1
        if not self._left:
            self._counts *= 0.5
            self._left = self._period

    def values(self) -> npt.NDArray[np.float64]:
        return self._counts


class LeastFrequentlyRecentlyUsed(ByValue):
    """Between LRU and LFU: the sum over an expert's uses of 0.5 ** (visits since / half-life).

    Source: the combined recency and frequency of Lee et al., "LRFU: A Spectrum of Policies", IEEE ToC 50 (2001).
    """

    #: Flat between 8 and 24 on every trace. Source: `python -m benchmarks policies`, shared traces.
    HALF_LIFE = 14.0

    def __init__(self, slot_count: int, expert_count: int, half_life: float = HALF_LIFE) -> None:
        super().__init__(slot_count, expert_count)
        self._growth = 0.5 ** (-1.0 / half_life)
        # Instead of shrinking every count at every visit, what a use adds grows.
        self._unit = 1.0
        self._sums = np.zeros(expert_count)

    def record(self, expert_ids: ExpertIds) -> None:
        self._unit *= self._growth
        self._sums[expert_ids] += self._unit
        if self._unit > _UNIT_MAX:
            self._sums /= self._unit
            self._unit = 1.0

    def values(self) -> npt.NDArray[np.float64]:
        return self._sums

    def rates(self) -> npt.NDArray[np.float64]:
        """[experts] share of the latest visits that needed each expert."""
        rates: npt.NDArray[np.float64] = self._sums * ((1.0 - 1.0 / self._growth) / self._unit)
        return rates


class ClassLeastRecentlyUsed(LeastFrequentlyRecentlyUsed):
    """Evicts from the lowest class of use counts (a power of two each), and the least recent inside the class.

    Source: the decayed use counts of llama.cpp's expert cache; half-life of 128 tokens.
    """

    def __init__(self, slot_count: int, expert_count: int) -> None:
        super().__init__(slot_count, expert_count, half_life=128.0)

    def victim(self, candidates: Mask, last_read: Epochs) -> int:
        slot_ids = candidate_ids(candidates)
        # Below one use there is only one class.
        counts = np.maximum(self._sums[self._expert_of[slot_ids]] / self._unit, 0.5)
        classes = np.frexp(counts)[1]
        return least_recent(slot_ids[classes == classes[classes.argmin()]], last_read)


assert math.isfinite(_UNIT_MAX * 2)
