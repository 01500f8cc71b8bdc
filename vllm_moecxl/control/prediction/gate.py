"""The next layers' gates, applied early: what their router makes of this layer's input, calibrated."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.prediction.base import Observation, Probabilities, Step, Target
from vllm_moecxl.control.prediction.requests import last_token_of

#: Weight of an old visit in what is known of the slope; the calibration follows a change within some hundred visits.
_DECAY = 0.998
#: How firmly the first guess is believed, in units of curvature.
_PRIOR = 4.0
#: Routers that rule experts out score them with minus infinity, which is only so much less likely here.
MARGIN_MAX = 30.0
#: No evidence of one predictor is more than this, in logits.
LOGIT_MAX = 12.0


class Calibration:
    """Turns a router's scores into logits: `slope * margin + offset`, by online Newton steps on the log loss.

    The margin is a score's distance from the middle between the k-th and the next one, so only differences count.
    """

    def __init__(self, topk: int) -> None:
        self._topk = topk
        self._slope, self._offset = 1.0, 0.0
        self._curvature = np.eye(2) * _PRIOR

    def margins(self, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """[requests, experts] float32, of scores of the same shape; there are more experts than k."""
        k = self._topk
        ordered = np.partition(scores, (-k - 1, -k), axis=1)
        middles: npt.NDArray[np.float32] = (ordered[:, -k - 1, None] + ordered[:, -k, None]) * np.float32(0.5)
        margins: npt.NDArray[np.float32] = np.clip(scores - middles, -MARGIN_MAX, MARGIN_MAX)
        return margins

    def logits(self, margins: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """[requests, experts] float32."""
        logits = margins * np.float32(self._slope)
        logits += np.float32(self._offset)
        np.clip(logits, -LOGIT_MAX, LOGIT_MAX, out=logits)
        return logits

    def learn(self, margins: npt.NDArray[np.float32], expert_ids: npt.NDArray[np.int64]) -> None:
        """A visit: `expert_ids` [requests, k] were used."""
        p = sigmoid(self.logits(margins))
        spread = p * (1 - p)
        weighted = spread * margins
        cross = float(weighted.sum())
        seen = np.array([[float(np.vdot(weighted, margins)), cross], [cross, float(spread.sum())]])
        self._curvature = self._curvature * _DECAY + seen + np.eye(2) * (_PRIOR * (1 - _DECAY))
        p[np.arange(len(p))[:, None], expert_ids] -= 1
        (a, b), (_, d) = self._curvature.tolist()
        by_slope, by_offset = float(np.vdot(p, margins)), float(p.sum())
        determinant = a * d - b * b
        self._slope -= (d * by_slope - b * by_offset) / determinant
        self._offset -= (a * by_offset - b * by_slope) / determinant


def sigmoid(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A fresh array of the same shape; `logits` stay within what float32 can exponentiate."""
    p = np.negative(logits)
    np.exp(p, out=p)
    p += 1
    np.reciprocal(p, out=p)
    return p


class Gate:
    """Trusts `Observation.ahead`, as far as it has been right for that layer and distance."""

    def __init__(self, layer_count: int, expert_count: int, topk: int) -> None:
        self._topk = topk
        self._is_selective = topk < expert_count
        self._calibrations: dict[tuple[int, int], Calibration] = {}
        #: By distance and target layer, the margins of a prediction whose visit has not come.
        self._pending: dict[tuple[int, int], npt.NDArray[np.float32]] = {}
        self._ahead: npt.NDArray[np.float32] | None = None
        self._last = np.empty(0, np.int64)

    def begin(self, step: Step) -> None:
        self._last = last_token_of(step)
        self._pending.clear()
        self._ahead = None

    def observe(self, seen: Observation) -> None:
        self._ahead = seen.ahead
        for key in [key for key in self._pending if key[1] == seen.layer_id]:
            self._calibrations[key].learn(self._pending.pop(key), seen.expert_ids[self._last])

    def predict(self, target: Target) -> Probabilities | None:
        if target.is_next_step or self._ahead is None or target.distance > len(self._ahead) or not self._is_selective:
            return None
        key = (target.distance, target.layer_id)
        calibration = self._calibrations.get(key)
        if calibration is None:
            calibration = self._calibrations[key] = Calibration(self._topk)
        margins = self._pending[key] = calibration.margins(self._ahead[target.distance - 1][self._last])
        return sigmoid(calibration.logits(margins))

    def forget(self, request_id: str) -> None:
        """Nothing is kept by request."""
