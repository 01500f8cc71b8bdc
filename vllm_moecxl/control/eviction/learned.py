"""Learns while it runs which experts are needed again soon: recency and frequency, and what follows what."""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.eviction.base import ByValue, ExpertIds, Mask

Floats = npt.NDArray[np.float32]

#: Visits after which a use counts half, for three estimates of an expert's rate of use.
#: Source: the shared traces (`python -m benchmarks policies`); doubling the shorter two moves no cell by 0.1 points.
HALF_LIVES = (4.0, 32.0, 512.0)
#: How far one visit moves the log-odds of an expert, at most. Source: as above; from 0.06 to 0.24 every cell stays
#: within 0.3 points.
_STEP = 0.12
#: Visits that are remembered one by one.
_HISTORY_COUNT = 64
#: A slot is judged by what is needed within so many visits, at most.
_HORIZON_MAX = 16
#: Visits that wait to be counted, at most.
_BATCH_COUNT = 32
assert _HORIZON_MAX + _BATCH_COUNT < _HISTORY_COUNT
#: Rates are told apart down to this share of the mean rate.
_RATE_FLOOR = np.float32(0.05)
_HALF = np.float32(0.5)
_MEAN = np.full(len(HALF_LIVES), 1.0 / len(HALF_LIVES), dtype=np.float32)
#: A visit that needs more of the experts than this says nothing about what follows what.
_WIDE_SHARE = 0.5


class _Sample:
    """What was foretold at one visit.

    Attributes:
        visit: its number.
        experts: what it needed.
        log_odds: [experts] float32 of being needed within the horizon.
    """

    __slots__ = ("experts", "log_odds", "visit")

    def __init__(self, visit: int, experts: npt.NDArray[np.intp], log_odds: Floats) -> None:
        self.visit = visit
        self.experts = experts
        self.log_odds = log_odds


class LearnedNextUse(ByValue):
    """Evicts what is least likely to be needed within the horizon: as many visits as fill the slots once.

    The log-odds of an expert are the mean logarithm of its rates of use over three half-lives, plus a weight for each
    expert that the current visit needs. The weights are learnt online by logistic regression from how earlier
    estimates turned out. Reading costs one store; everything else waits for the first eviction of a visit.

    Source: the relaxed Belady boundary of Song et al., "Learning Relaxed Belady for Content Distribution Network
    Caching", NSDI 2020, with the expert-to-expert activation of MoE-Infinity (Xue et al. 2024) as the features.
    """

    def __init__(self, slot_count: int, expert_count: int) -> None:
        super().__init__(slot_count, expert_count)
        self._slot_count = slot_count
        #: [history, experts] what each of the latest visits needed, by visit number modulo the length.
        self._needed = np.zeros((_HISTORY_COUNT, expert_count), dtype=np.bool_)
        self._visit_count = 0
        self._counted_count = 0
        decays = 0.5 ** (1.0 / np.array(HALF_LIVES))
        ages = np.arange(_BATCH_COUNT - 1, -1, -1)
        #: [half-lives, batch] what each visit of a batch adds to the rates, and [half-lives, 1] what is left of them.
        self._gains = ((1.0 - decays)[:, None] * decays[:, None] ** ages).astype(np.float32)
        self._remains = (decays[:, None, None] ** np.arange(_BATCH_COUNT + 1)[:, None]).astype(np.float32)
        self._rates = np.full((len(HALF_LIVES), expert_count), 1.0 / expert_count, dtype=np.float32)
        #: [experts, experts] what needing the row's expert now says about needing the column's soon.
        self._weights = np.zeros((expert_count, expert_count), dtype=np.float32)
        self._samples: deque[_Sample] = deque()
        self._log_odds = np.zeros(expert_count, dtype=np.float32)
        self._mean_width = 0.0

    def record(self, expert_ids: ExpertIds) -> None:
        row = self._needed[self._visit_count % _HISTORY_COUNT]
        row.fill(False)
        row[expert_ids] = True
        self._visit_count += 1
        if self._visit_count - self._counted_count == _BATCH_COUNT:
            self._count()

    def values(self) -> Floats:
        if self._visit_count != self._counted_count:
            self._count()
            self._learn()
            self._foretell()
        return self._log_odds

    @property
    def _horizon(self) -> int:
        """Visits that need as many experts as there are slots."""
        return min(max(round(self._slot_count / max(self._mean_width, 1.0)), 1), _HORIZON_MAX)

    def _rows(self, first: int, end: int) -> Mask:
        """[end - first, experts] what the visits [first, end) needed."""
        first, end = first % _HISTORY_COUNT, end % _HISTORY_COUNT
        return self._needed[first:end] if first < end else np.concatenate((self._needed[first:], self._needed[:end]))

    def _count(self) -> None:
        """Bring the rates up to date."""
        count = self._visit_count - self._counted_count
        rows = self._rows(self._counted_count, self._visit_count)
        self._rates *= self._remains[:, count]
        self._rates += self._gains[:, -count:] @ rows.astype(np.float32)
        width = np.count_nonzero(rows) / count
        self._mean_width += (width - self._mean_width) * (0.1 if self._mean_width else 1.0)
        self._counted_count = self._visit_count

    def _learn(self) -> None:
        """Compare what was foretold with what came."""
        horizon = self._horizon
        while self._samples and self._samples[0].visit + horizon < self._visit_count:
            sample = self._samples.popleft()
            if self._visit_count - sample.visit > _HISTORY_COUNT:
                continue
            came = np.logical_or.reduce(self._rows(sample.visit + 1, sample.visit + 1 + horizon))
            error = came - (_HALF + _HALF * np.tanh(_HALF * sample.log_odds))
            self._weights[sample.experts] += error * np.float32(_STEP / sample.experts.size)

    def _foretell(self) -> None:
        """Judge every expert, as of the latest visit."""
        experts = self._needed[(self._visit_count - 1) % _HISTORY_COUNT].nonzero()[0]
        # Relative to the mean rate.
        rates = self._rates * np.float32(self.expert_count / max(self._mean_width, 1.0))
        rates += _RATE_FLOOR
        log_odds = _MEAN @ np.log(rates)
        if experts.size <= _WIDE_SHARE * self.expert_count:
            log_odds += np.add.reduce(self._weights[experts])
            self._samples.append(_Sample(self._visit_count - 1, experts, log_odds))
        self._log_odds = log_odds
