"""Evicts what is expected to be needed again last, by probabilities that a predictor keeps up to date."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.eviction.frequency import LeastFrequentlyRecentlyUsed


class NextUse(LeastFrequentlyRecentlyUsed):
    """Belady's rule on expectations.

    Layers are visited in a cycle, so that the time to an expert's next use is a number of cycles. With probability p it
    is the next one; later on an expert is needed at the rate of its latest uses: 1 + (1 - p) / rate cycles. Without a
    predictor p is that rate too.

    Attributes:
        probabilities: [experts] float32, P(the next visit needs each expert), as somebody else keeps it up to date
            (`Forecast.scores`); None where nobody does.
    """

    def __init__(
        self, slot_count: int, expert_count: int, probabilities: npt.NDArray[np.float32] | None = None
    ) -> None:
        super().__init__(slot_count, expert_count)
        assert probabilities is None or probabilities.shape == (expert_count,)
        self.probabilities = probabilities

    def values(self) -> npt.NDArray[np.float64]:
        if self.probabilities is None:
            return super().values()
        # What was never used is not quite hopeless: else no probability could tell two such experts apart.
        rates = np.maximum(self.rates(), 1e-3 / self.expert_count)
        values: npt.NDArray[np.float64] = (self.probabilities - 1.0) / rates
        return values
