"""Logistic mixing: several predictors' evidence becomes one calibrated probability."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.prediction.base import Probabilities

#: Weight of an old visit in what is known of the weights: they follow a change within some hundred visits.
_DECAY = 0.998
#: How firmly the first weights are believed, in units of curvature.
_PRIOR = 20.0


class Mixture:
    """p = sigmoid(base + sum of weight * evidence + bias), with weights learned online, a set for each kind of target.

    Evidence is in logits over the base rate's, so that what knows nothing adds nothing. Weights are learned by
    Newton's method on the log loss: nothing to tune, and calibrated after some visits.
    Source: C. Mattern, "Mixing Strategies in Data Compression" (2012); M. Mahoney, PAQ7 (2005).

    Args:
        kind_count: kinds of targets.
        predictor_count: whose evidence is mixed.
        base_rate: probability without evidence.
    """

    def __init__(self, kind_count: int, predictor_count: int, base_rate: float) -> None:
        count = predictor_count + 1
        #: [kinds, predictors + 1] float32, the last one the bias.
        self.weights = np.full((kind_count, count), 1 / max(1, predictor_count), np.float32)
        self.weights[:, -1] = 0
        self._ridge = np.eye(count, dtype=np.float32) * np.float32(_PRIOR * (1 - _DECAY))
        self._curvature = np.repeat(np.eye(count, dtype=np.float32)[None] * _PRIOR, kind_count, axis=0)
        self._base_logit = np.float32(np.log(base_rate / (1 - base_rate)))

    def drop(self, index: int) -> None:
        """A predictor says no more; should it come back, it starts without weight, so that it does no harm."""
        self.weights[:, index] = 0

    def mix(self, kinds: list[int], evidence: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], Probabilities]:
        """Logits and probabilities, [targets, cells] float32 both.

        Args:
            kinds: of the targets.
            evidence: [targets, predictors + 1, cells] float32, the last row of each is 1.
        """
        logits = (self.weights[kinds][:, None] @ evidence)[:, 0]
        logits += self._base_logit
        p = np.negative(logits)
        np.exp(p, out=p)
        p += 1
        return logits, np.reciprocal(p, out=p)

    def learn(
        self,
        kinds: list[int],
        evidence: npt.NDArray[np.float32],
        probabilities: Probabilities,
        used: npt.NDArray[np.float32],
    ) -> None:
        """One step for each of `kinds`, which are distinct.

        Args:
            kinds: of the targets.
            evidence: [targets, predictors + 1, cells] float32.
            probabilities: [targets, cells] float32, what was made of it.
            used: [cells] float32, 1 where the visit used the expert, else 0.
        """
        spread = probabilities * (1 - probabilities)
        transposed = evidence.transpose(0, 2, 1)
        curvature = self._curvature[kinds] * np.float32(_DECAY)
        curvature += (evidence * spread[:, None]) @ transposed
        curvature += self._ridge
        self._curvature[kinds] = curvature
        gradient = (probabilities - used)[:, None] @ transposed
        self.weights[kinds] -= np.linalg.solve(curvature, gradient.transpose(0, 2, 1))[:, :, 0]
