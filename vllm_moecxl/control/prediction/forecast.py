"""The ensemble: mixes what all predictors say into one calibrated probability, and leaves out who does not help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.prediction.base import Observation, Predictor, Probabilities, Step, Target
from vllm_moecxl.control.prediction.merit import PICK_PROBABILITY, Merit, PredictorReport, log_loss
from vllm_moecxl.control.prediction.mixture import Mixture
from vllm_moecxl.control.prediction.requests import last_token_of

#: Widest step that is predicted, in requests: beyond it a step uses nearly every expert anyway.
REQUEST_COUNT_MAX = 32
#: Probabilities are kept this far from 0 and 1: no evidence is absolute.
PROBABILITY_MIN = 1e-3
#: One visit in so many is scored for the verdicts on predictors.
SCORE_PERIOD = 8
#: One visit in so many teaches the mixture, once it has seen so many steps: its few weights change slowly. The first
#: layers' have no others to learn from, and are always learned from.
LEARN_PERIOD = 4
EAGER_STEP_COUNT = 64
#: Weight of the latest step in how often an expert is used by steps, which is what `scores` say of a far visit.
USE_RATE = 0.05


@dataclass(frozen=True)
class _Pending:
    """A prediction whose visit has not come: [predictors + 1, cells], [cells] and [cells] float32."""

    kind: int
    evidence: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32]
    probabilities: Probabilities


class Forecast:
    """See the module. Not thread-safe: the sidecar, or the simulator, owns it.

    Args:
        layer_count: MoE layers.
        expert_count: experts of each.
        topk: experts of one token in one layer.
        predictors: by name.
        reach: layers ahead that are predicted.

    Attributes:
        scores: [layers, experts] float32, probability that a layer's next visit uses the expert, by any request of the
            step. Predicted for layers within reach, elsewhere how often recent steps did.
    """

    def __init__(
        self, layer_count: int, expert_count: int, topk: int, predictors: Mapping[str, Predictor], *, reach: int = 2
    ) -> None:
        self._layer_count = layer_count
        self._expert_count = expert_count
        self._reach = min(reach, layer_count)
        # A layer whose experts are all used has no base rate in logits; nothing is predicted there.
        self._base_rate = min(topk / expert_count, 1 - PROBABILITY_MIN)
        self._base_logit = np.float32(np.log(self._base_rate / (1 - self._base_rate)))
        self._predictors = dict(predictors)
        self._merits = {name: Merit() for name in predictors}
        self._mixture = Mixture(3 * self._reach, len(predictors), self._base_rate)
        self.scores = np.full((layer_count, expert_count), self._base_rate, np.float32)
        self._use_rates = self.scores.copy()
        self._step: Step | None = None
        self._step_count = 0
        self._is_narrow = False
        #: By layer: predictions by distance, for the requests of `_pending_ids`.
        self._pending: list[dict[int, _Pending]] = [{} for _ in range(layer_count)]
        self._pending_ids: tuple[str, ...] = ()

    def begin(self, step: Step) -> tuple[Target, ...]:
        """A step begins: its first layers are predicted anew, since its tokens are known now."""
        if self._is_narrow:
            self._step_count += 1
            for i, merit in enumerate(self._merits.values()):
                merit.end_step()
                if not merit.is_on:
                    self._mixture.drop(i)
        self._step = step
        self._is_narrow = 0 < len(step.request_ids) <= REQUEST_COUNT_MAX and not step.is_prompt.any()
        for predictor in self._predictors.values():
            predictor.begin(step)
        if not self._is_narrow or step.request_ids != self._pending_ids:
            for pending in self._pending:
                pending.clear()
        if not self._is_narrow:
            return ()
        return self._predict([Target(distance - 1, distance, False) for distance in range(1, self._reach + 1)])

    def observe(self, seen: Observation) -> tuple[Target, ...]:
        """Learn from a layer, then predict the next ones.

        Returns:
            Whose `scores` have just been renewed, nearest first; none for prompts and wide steps.
        """
        layer_id = seen.layer_id
        used = self._used(seen)
        if self._is_narrow:
            self._learn(layer_id, used)
        union = used if len(used) == 1 else used.max(0, keepdims=True)
        rates = self._use_rates[layer_id]
        rates += np.float32(USE_RATE) * (union[0] - rates)
        self.scores[layer_id] = rates
        for predictor in self._predictors.values():
            predictor.observe(seen)
        if not self._is_narrow:
            return ()
        targets = []
        for distance in range(1, self._reach + 1):
            passes, target_id = divmod(layer_id + distance, self._layer_count)
            targets.append(Target(target_id, distance, passes > 0))
        return self._predict(targets)

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        for predictor in self._predictors.values():
            predictor.forget(request_id)

    def report(self) -> dict[str, PredictorReport]:
        """By name, how each predictor does."""
        return {name: merit.report() for name, merit in self._merits.items()}

    def _used(self, seen: Observation) -> npt.NDArray[np.float32]:
        """[requests, experts] float32: 1 where its last token used the expert; of wide steps one row for all."""
        assert self._step is not None
        expert_ids = seen.expert_ids
        if not self._is_narrow:
            used = np.zeros((1, self._expert_count), np.float32)
            used[0, expert_ids.ravel()] = 1
            return used
        used = np.zeros((len(self._step.request_ids), self._expert_count), np.float32)
        if len(expert_ids) > len(used):  # speculative decoding
            expert_ids = expert_ids[last_token_of(self._step)]
        used[np.arange(len(used))[:, None], expert_ids] = 1
        return used

    def _predict(self, targets: Sequence[Target]) -> tuple[Target, ...]:
        assert self._step is not None
        request_count = len(self._step.request_ids)
        predictor_count = len(self._predictors)
        shape = (len(targets), predictor_count + 1, request_count, self._expert_count)
        stated = np.empty(shape, np.float32)
        for i, (name, predictor) in enumerate(self._predictors.items()):
            is_on = self._merits[name].is_on
            for j, target in enumerate(targets):
                said = predictor.predict(target) if is_on else None
                stated[j, i] = self._base_rate if said is None else said
        evidence = stated.reshape(*shape[:2], -1)
        said_logits = evidence[:, :-1]
        np.maximum(said_logits, np.float32(PROBABILITY_MIN), out=said_logits)
        np.minimum(said_logits, np.float32(1 - PROBABILITY_MIN), out=said_logits)
        said_logits /= 1 - said_logits
        np.log(said_logits, out=said_logits)
        said_logits -= self._base_logit
        evidence[:, -1] = 1
        kinds = [_kind(target) for target in targets]
        logits, probabilities = self._mixture.mix(kinds, evidence)
        self._pending_ids = self._step.request_ids
        for j, target in enumerate(targets):
            pending = _Pending(kinds[j], evidence[j], logits[j], probabilities[j])
            self._pending[target.layer_id][target.distance] = pending
            by_request = probabilities[j].reshape(request_count, -1)
            self.scores[target.layer_id] = by_request[0] if request_count == 1 else 1 - np.prod(1 - by_request, 0)
        return tuple(targets)

    def _learn(self, layer_id: int, used: npt.NDArray[np.float32]) -> None:
        """Hold a layer's predictions against what it used."""
        pending = list(self._pending[layer_id].values())
        self._pending[layer_id].clear()
        if not pending:
            return
        used = used.reshape(-1)
        turn = self._step_count + layer_id
        if turn % SCORE_PERIOD == 0:
            self._score(pending[-1], used)
        if self._step_count >= EAGER_STEP_COUNT and turn % LEARN_PERIOD and layer_id >= self._reach:
            return
        self._mixture.learn(
            [prediction.kind for prediction in pending],
            np.array([prediction.evidence for prediction in pending]),
            np.array([prediction.probabilities for prediction in pending]),
            used,
        )

    def _score(self, pending: _Pending, used: npt.NDArray[np.float32]) -> None:
        """Judge every predictor by its latest word."""
        evidence = pending.evidence[:-1]
        added = self._mixture.weights[pending.kind, :-1, None] * evidence
        base_loss = float(log_loss(np.full_like(used, self._base_logit), used))
        saved = log_loss(pending.logits - added, used) - log_loss(pending.logits, used)
        solo_logits = evidence + self._base_logit
        solo_saved = base_loss - log_loss(solo_logits, used)
        picks = solo_logits > np.log(PICK_PROBABILITY / (1 - PICK_PROBABILITY))
        right_counts = picks @ used
        for i, merit in enumerate(self._merits.values()):
            if merit.is_on:
                pick_count = int(np.count_nonzero(picks[i]))
                merit.score(base_loss, float(saved[i]), float(solo_saved[i]), pick_count, int(right_counts[i]))


def _kind(target: Target) -> int:
    """Targets of a kind share a mixture: evidence weighs differently by distance, and where a new token comes between.

    For the next step, the token is unknown; for a step's first layers, it is nearly all that is known.
    """
    is_first = target.layer_id < target.distance and not target.is_next_step
    return 3 * (target.distance - 1) + (1 if target.is_next_step else 2 if is_first else 0)
