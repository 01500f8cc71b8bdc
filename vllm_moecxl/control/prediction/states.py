"""Learned probabilities of small discrete states: what a history is worth is counted, not assumed."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

#: Weight of the first guess, in observations, while a state has not been seen often.
PRIOR_COUNT = 4.0
#: Observations of a state after which its counts are halved, so that a change of traffic is noticed.
WINDOW_COUNT = 1e6


class StateRates:
    """How often an expert in each state is used next.

    Source: indirect context models, M. Mahoney, "Adaptive Weighing of Context Models for Lossless Data Compression"
    (2005): a history selects an adaptive probability instead of being turned into one by a formula.

    Args:
        initial: [states] float64, what is guessed of those that nobody has seen yet.
    """

    def __init__(self, initial: npt.NDArray[np.float64]) -> None:
        self._use_counts = PRIOR_COUNT * initial
        self._seen_counts = np.full(len(initial), PRIOR_COUNT)
        #: [states] float32.
        self.rates = initial.astype(np.float32)

    def learn(self, states: npt.NDArray[Any], used_states: npt.NDArray[Any]) -> None:
        """Count visits: the states of all experts, and of those that were used; of any shape."""
        self._seen_counts += np.bincount(states.ravel(), minlength=len(self.rates))
        self._use_counts += np.bincount(used_states.ravel(), minlength=len(self.rates))
        is_full = self._seen_counts > WINDOW_COUNT
        self._seen_counts[is_full] *= 0.5
        self._use_counts[is_full] *= 0.5
        np.divide(self._use_counts, self._seen_counts, out=self.rates, casting="same_kind")
