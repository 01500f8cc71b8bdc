"""Whether a predictor earns its time: what it adds to the ensemble, and when it is left out or tried again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

#: Steps before the first verdict: tables are empty at first.
GRACE_STEP_COUNT = 128
#: Steps of a trial, and between verdicts.
TRIAL_STEP_COUNT = 64
#: Steps without a predictor before it is tried again; doubled by each trial that fails.
PAUSE_STEP_COUNT = 256
PAUSE_STEP_COUNT_MAX = 4096
#: What a predictor has to save, as a share of the log loss of guessing the base rate.
#: Source: published traces, 2026-11-22: one worth 0.0045 raised recall by 0.3 %; on random routing 0.001 is noise.
GAIN_MIN = 0.002
#: A pick of a predictor is an expert that it finds likelier than this.
PICK_PROBABILITY = 0.5


@dataclass(frozen=True)
class PredictorReport:
    """How a predictor does.

    Attributes:
        is_on: whether it is asked at present.
        gain: what the ensemble loses without it, as a share of the base rate's log loss; of its latest verdict.
        solo_gain: what it would save alone, likewise; negative if it is worse than the base rate.
        precision: share of its picks (experts that it finds likelier than not) that were used; 0 without any.
        pick_count: its picks that were looked at.
    """

    is_on: bool
    gain: float
    solo_gain: float
    precision: float
    pick_count: int


class Merit:
    """Judges one predictor: on, then off when it does not help, and now and then on trial again."""

    def __init__(self) -> None:
        self.is_on = True
        self._left_step_count = GRACE_STEP_COUNT
        self._pause_step_count = PAUSE_STEP_COUNT
        self._base_loss = self._saved = self._solo_saved = 0.0
        self._gain = self._solo_gain = 0.0
        self._pick_count = self._right_count = 0

    def score(self, base_loss: float, saved: float, solo_saved: float, pick_count: int, right_count: int) -> None:
        """A sampled visit; losses are in nats."""
        self._base_loss += base_loss
        self._saved += saved
        self._solo_saved += solo_saved
        self._pick_count += pick_count
        self._right_count += right_count

    def end_step(self) -> None:
        """A narrow step is over; a verdict may be due."""
        self._left_step_count -= 1
        if self._left_step_count > 0:
            return
        if not self.is_on:
            self.is_on = True
            self._left_step_count = TRIAL_STEP_COUNT
            return
        self._left_step_count = TRIAL_STEP_COUNT
        if self._base_loss == 0:  # nothing was scored
            return
        self._gain, self._solo_gain = self._saved / self._base_loss, self._solo_saved / self._base_loss
        if self._gain >= GAIN_MIN:
            self._pause_step_count = PAUSE_STEP_COUNT
            # What was scored before still counts a little, so that one unlucky request does not decide.
            self._base_loss, self._saved, self._solo_saved = (
                0.25 * total for total in (self._base_loss, self._saved, self._solo_saved)
            )
            return
        self._base_loss = self._saved = self._solo_saved = 0.0
        self.is_on = False
        self._left_step_count = self._pause_step_count
        self._pause_step_count = min(2 * self._pause_step_count, PAUSE_STEP_COUNT_MAX)

    def report(self) -> PredictorReport:
        """As of now."""
        precision = self._right_count / self._pick_count if self._pick_count else 0.0
        return PredictorReport(self.is_on, self._gain, self._solo_gain, precision, self._pick_count)


def log_loss(logits: npt.NDArray[np.float32], used: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """[...] float32, in nats, summed over the last axis: `used` [cells] is 1 or 0, `logits` [..., cells]."""
    losses: npt.NDArray[np.float32] = (np.logaddexp(0, logits) - logits * used).sum(-1)
    return losses
