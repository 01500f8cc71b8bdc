"""A small model learned online on the CPU: which experts follow from those of the layers and the token before."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.prediction.base import Observation, Probabilities, Step, Target
from vllm_moecxl.control.prediction.gate import LOGIT_MAX, Calibration, sigmoid
from vllm_moecxl.control.prediction.requests import PerRequest, last_token_of

#: Experts of one token that a prediction looks at: as many of the layers before the target as that makes.
#: Source: recall on the published traces, 2026-11-22: it grows a little with each layer, time with each expert.
FEATURE_COUNT = 32
LAYER_COUNT_MAX = 8
#: Step of AdaGrad, for all features of a prediction together. Source: as above; 0.8 and 1.8 differ by under 1 %.
RATE = 1.2
#: The same for the input of a layer, whose numbers are many and small. Source: hidden states of a small trained model,
#: 2026-11-22; 0.2 does as well, 0.4 worse.
HIDDEN_RATE = 0.1
#: Numbers that an input is folded to.
HIDDEN_COUNT = 256
#: Length that a folded input is scaled to, so that its numbers are of the size of one expert's.
HIDDEN_NORM = 4.0
#: Requests of a visit that are learned from, in turns: it bounds the time that a visit takes.
LEARNED_COUNT_MAX = 4


@dataclass
class _Model:
    """Weights of one target layer at one distance.

    Attributes:
        layer_ids: [groups] int64, whose experts are its features: the target's own (of the token before), then those
            before it, nearest first.
        weights: [features, experts] float32, a row for each expert of each group, and one for "none yet".
        squares: [features] float32, AdaGrad's sums.
        gate: calibrates the gate applied early; the rest then learns what that misses.
        hidden_weights: [folded hidden, experts] float32; None where the layer's input is not known.
        hidden_squares: [folded hidden] float32.
    """

    layer_ids: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    squares: npt.NDArray[np.float32]
    gate: Calibration | None
    hidden_weights: npt.NDArray[np.float32] | None
    hidden_squares: npt.NDArray[np.float32]


@dataclass
class _Pending:
    """A prediction whose visit has not come: what it was made from; requests come first in every array."""

    model: _Model
    features: npt.NDArray[np.int64]
    rows: npt.NDArray[np.float32]
    margins: npt.NDArray[np.float32] | None
    hidden: npt.NDArray[np.float32] | None
    probabilities: Probabilities


class Learned:
    """Logistic regression on the experts of the layers before, of the token before, and on what the gates say.

    Where the target's gate was applied early and the layer's input is known, it learns what these two miss; without
    them, experts alone. Learns at decode steps only, from the predictions that it made.
    Source: ProMoE (Song et al., 2024) learns such predictors offline; J. Duchi et al., "Adaptive Subgradient Methods
    for Online Learning and Stochastic Optimization" (2011), one sum for each row of weights.
    """

    def __init__(self, layer_count: int, expert_count: int, topk: int) -> None:
        self._layer_count = layer_count
        self._expert_count = expert_count
        self._topk = topk
        self._depth = max(1, min(LAYER_COUNT_MAX, FEATURE_COUNT // topk, layer_count - 1))
        self._base_logit = np.float32(np.log(topk / max(expert_count - topk, 0.5)))
        self._rate = np.float32(RATE / np.sqrt((self._depth + 1) * topk))
        self._offsets = (np.arange(self._depth + 1) * (expert_count + 1))[:, None]
        #: Sums features: a product is quicker than a sum over an axis.
        self._ones = np.ones((self._depth + 1) * topk, np.float32)
        #: Chosen experts + 1, 0 where there are none yet.
        self._chosen = PerRequest((layer_count, topk), np.int64)
        self._models: dict[tuple[int, int, bool, int], _Model] = {}
        self._pending: list[dict[int, _Pending]] = [{} for _ in range(layer_count)]
        self._step: Step | None = None
        self._rows = self._last = np.empty(0, np.int64)
        self._seen: Observation | None = None
        self._hidden: npt.NDArray[np.float32] | None = None
        self._signs: npt.NDArray[np.float32] | None = None
        self._first_learned = 0

    def begin(self, step: Step) -> None:
        if self._step is None or step.request_ids != self._step.request_ids:
            for pending in self._pending:
                pending.clear()
            self._hidden = None
        self._step = step
        self._rows = self._chosen.rows(step.request_ids)
        self._last = last_token_of(step)
        self._seen = None  # while the last layer's input still says something of the first ones'

    def observe(self, seen: Observation) -> None:
        expert_ids = seen.expert_ids[self._last]
        pending = self._pending[seen.layer_id]
        for prediction in pending.values():
            self._learn(prediction, expert_ids)
        pending.clear()
        self._chosen.values[self._rows, seen.layer_id] = expert_ids + 1
        self._seen = seen
        self._hidden = self._fold(seen.hidden[self._last]) if seen.hidden is not None else None

    def predict(self, target: Target) -> Probabilities | None:
        ahead = self._seen.ahead if self._seen is not None else None
        is_told = ahead is not None and target.distance <= len(ahead) and not target.is_next_step
        has_gate = is_told and self._topk < self._expert_count
        hidden = self._hidden
        model = self._model(target, has_gate, 0 if hidden is None else hidden.shape[1])
        chosen = self._chosen.values[self._rows[:, None], model.layer_ids]
        features = (chosen + self._offsets).reshape(len(chosen), -1)
        rows = model.weights.take(features, axis=0)  # much quicker than indexing
        logits = self._ones @ rows
        margins = None
        if model.gate is not None:
            assert ahead is not None
            margins = model.gate.margins(ahead[target.distance - 1][self._last])
            logits += model.gate.logits(margins)
        else:
            logits += self._base_logit
        if hidden is not None:
            assert model.hidden_weights is not None
            logits += hidden @ model.hidden_weights
        p = sigmoid(np.clip(logits, -LOGIT_MAX, LOGIT_MAX, out=logits))
        self._pending[target.layer_id][target.distance] = _Pending(model, features, rows, margins, hidden, p)
        return p

    def forget(self, request_id: str) -> None:
        self._chosen.forget(request_id)

    def _model(self, target: Target, has_gate: bool, hidden_count: int) -> _Model:
        key = (target.layer_id, target.distance, has_gate, hidden_count)
        model = self._models.get(key)
        if model is None:
            before = [(target.layer_id - target.distance - i) % self._layer_count for i in range(self._depth)]
            feature_count = (self._depth + 1) * (self._expert_count + 1)
            model = self._models[key] = _Model(
                np.array([target.layer_id, *before]),
                np.zeros((feature_count, self._expert_count), np.float32),
                np.ones(feature_count, np.float32),
                Calibration(self._topk) if has_gate else None,
                np.zeros((hidden_count, self._expert_count), np.float32) if hidden_count else None,
                np.ones(hidden_count, np.float32),
            )
        return model

    def _learn(self, pending: _Pending, expert_ids: npt.NDArray[np.int64]) -> None:
        """One step down the log loss; `expert_ids` [requests, k] were used."""
        model = pending.model
        if pending.margins is not None:
            assert model.gate is not None
            model.gate.learn(pending.margins, expert_ids)
        count = len(expert_ids)
        learned = range(count)
        if count > LEARNED_COUNT_MAX:
            learned = range(self._first_learned, self._first_learned + LEARNED_COUNT_MAX)
            self._first_learned = learned.stop % count
        for i in learned:
            i %= count
            error = -pending.probabilities[i]
            error[expert_ids[i]] += 1
            square = np.float32(float(error @ error) / self._topk)
            features = pending.features[i]
            squares = model.squares[features] + np.float32(0.5) * square
            model.squares[features] = squares
            steps = (self._rate / np.sqrt(squares))[:, None] * error
            if count == 1:  # nobody has changed the rows since
                steps += pending.rows[i]
                model.weights[features] = steps
            else:
                model.weights[features] += steps
            if pending.hidden is not None:
                assert model.hidden_weights is not None
                hidden = pending.hidden[i]
                model.hidden_squares += hidden * hidden * square
                scaled = hidden * np.float32(HIDDEN_RATE) / np.sqrt(model.hidden_squares)
                model.hidden_weights += scaled[:, None] * error

    def _fold(self, hidden: npt.NDArray[np.float32]) -> npt.NDArray[np.float32] | None:
        """[requests, at most 256] float32, all of one length: pieces of the input, added with signs of their own.

        None where the input has overflowed: one such number would stay in the weights for ever.

        Source: K. Weinberger et al., "Feature Hashing for Large Scale Multitask Learning" (2009): a signed fold keeps
        inner products on average, and costs one pass over the input where a random projection costs a matrix.
        """
        request_count, width = hidden.shape
        if width > HIDDEN_COUNT:
            piece_count = -(-width // HIDDEN_COUNT)
            if self._signs is None or len(self._signs) != piece_count:
                bits = np.random.default_rng(0).integers(0, 2, (piece_count, HIDDEN_COUNT))
                self._signs = (2 * bits - 1).astype(np.float32)
            if width < piece_count * HIDDEN_COUNT:
                hidden = np.pad(hidden, ((0, 0), (0, piece_count * HIDDEN_COUNT - width)))
            hidden = np.einsum("rph,ph->rh", hidden.reshape(request_count, piece_count, HIDDEN_COUNT), self._signs)
        lengths = np.sqrt(np.einsum("rh,rh->r", hidden, hidden)) + np.float32(1e-6)
        if not np.isfinite(lengths).all():
            return None
        scaled: npt.NDArray[np.float32] = hidden * (np.float32(HIDDEN_NORM) / lengths)[:, None]
        return scaled
